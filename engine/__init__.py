"""What every script shares: options, the loop, a run's folder, hardware, metrics."""
