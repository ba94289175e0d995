"""What compare.py and plot.py are made of: runs, reports, statistics, figures."""
