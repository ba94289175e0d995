#!/usr/bin/env bash
# Every study of preconditioning, one command each; but for kappa, listops_full, listops_full_slow,
# the confirmations and whole presets each arm has its own learning rate, in characters_384 the
# matrices' alone.
#
#   bash results/studies.sh                 # their names, and which have been run
#   bash results/studies.sh classify_muon   # run one, or go on with it where it was stopped
#
# A finished study leaves its compare.json and compare.md here, under its name. JOBS=2 runs are
# trained at once, one thread each. Needs requirements-extra.txt. Runs are shorter than the presets,
# so that a study takes up to an hour: characters a fourth of theirs, ListOps a half, images an
# eighth to three eighths, Pathfinder two thirds or two fifths, with AdamW as many as the preset.
# characters_muon and characters_adamw have their whole length: one and a half hours or more each.
# So long takes characters_384 too, listops_full and listops_full_slow an hour more.
#
# Some defaults were others when these studies ran, and their kept compare.json do not name them:
# AdamW on images and ListOps, Muon's momentum of 0.95 on characters (but for characters_384), its
# interval of 1 on ListOps, its matrices' rate of 1e-2 in characters_muon_short and kappa. In these
# two it took q, k and v of all heads for one matrix each.
set -euo pipefail
cd "$(dirname "$0")/.."

half="precond=True precond_power=0.5 precond_grad=True"
arms=(--arm "off:" --arm "paper: precond=True"
      --arm "paper-sqrt_d: precond=True precond_scale=sqrt_d" --arm "half-grad: $half")
few=(--arm "off:" --arm "paper: precond=True" --arm "half-grad: $half")
# (||A_i|| + 1)^-1 saturates: rows much shorter than 1 keep their length.
saturating=(--arm "saturating-grad: precond=True precond_eps=1 precond_grad=True")
adamw=config/shakespeare_char_adamw.toml
# C changes what the projections are given, and under Muon their rate is that of the matrices.
matrices=(--tune matrix_learning_rate=2.5e-3,5e-3,1e-2,2e-2)
momentum=--momentum=0.95
short="--max_iters=375 --warmup_iters=20 --matrix_learning_rate=1e-2 $momentum"
larger="--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=4 --eval_iters=25
        --dtype=bfloat16"
larger_muon="$larger --max_iters=750 --warmup_iters=50 --eval_interval=250 --learning_rate=3e-3"
pathfinder_adamw="pathfinder --max_iters=1500 --optimizer=adamw --init=gpt2"

images() {  # task, steps, optimizer, further words
    words=(train_vision.py "$1" --max_iters="$2" --eval_interval=$(($2 / 5)) --optimizer="$3"
           "${arms[@]}" "${@:4}" --tune learning_rate=5e-4,1e-3,2e-3,4e-3
           --tune_seeds=1 --seeds=5)
}

whole() {  # task, the recipe's name and rates, half-grad's
    words=(train_vision.py "$1" --arm "off:" --arm "$2 precond=True" --arm "$3 $half" --seeds=3)
}

pathfinder() {  # attention, steps
    words=(train_lra.py pathfinder --attention="$1" --max_iters="$2" "${arms[@]}"
           "${matrices[@]}" --tune learning_rate=1e-3,2e-3,4e-3 --tune_seeds=1 --seeds=5)
}

listops() {  # attention, optimizer, further words
    words=(train_lra.py listops --attention="$1" --max_iters=2000 --optimizer="$2"
           --matrix_interval=1 "${arms[@]}" "${@:3}"
           --tune learning_rate=5e-4,1e-3,2e-3,4e-3 --tune_seeds=1 --seeds=5)
}

study() {  # name -> the words after compare.py
    case $1 in
    characters_muon_short)
        words=(train.py $short --eval_interval=375 "${arms[@]}"
               --tune learning_rate=6e-3,1.2e-2 --tune_seeds=1 --seeds=5) ;;
    kappa)  # what moves it: the initialisation, the schedule, the optimizer, or C
        gpt2="init=gpt2 lr_schedule=cosine min_lr=3e-4"
        words=(train.py $short --eval_interval=125
               --arm "adamw: optimizer=adamw learning_rate=3e-3 $gpt2"
               --arm "adamw-paper: optimizer=adamw learning_rate=3e-3 $gpt2 precond=True"
               --arm "adamw-linear: optimizer=adamw learning_rate=3e-3 init=gpt2"
               --arm "adamw-zero: optimizer=adamw learning_rate=3e-3 min_lr=3e-4 lr_schedule=cosine"
               --arm "muon-gpt2: $gpt2"
               --arm "muon:" --arm "muon-paper: precond=True" --seeds=3) ;;
    characters_adamw_short)
        words=(train.py $adamw --max_iters=500 --eval_interval=125 "${arms[@]}" "${saturating[@]}"
               --tune learning_rate=1.5e-3,3e-3,6e-3,1.2e-2 --tune_seeds=1 --seeds=5) ;;
    characters_muon)
        words=(train.py $momentum "${arms[@]}" "${matrices[@]}"
               --tune learning_rate=6e-3,1.2e-2,2.4e-2 --tune_seeds=1 --seeds=5) ;;
    characters_adamw)
        words=(train.py $adamw "${arms[@]}" --tune learning_rate=1.5e-3,3e-3,6e-3,1.2e-2
               --tune_seeds=1 --seeds=5) ;;
    # The larger model, of which a run takes five minutes where bfloat16 is fast: only the matrices'
    # rate is tuned.
    characters_384)
        words=(train.py $larger_muon "${few[@]}"
               --tune matrix_learning_rate=1.25e-3,2.5e-3,5e-3,1e-2 --tune_seeds=1 --seeds=5) ;;
    characters_384_confirm)  # on other seeds, the baseline at the recipe's rate as well
        words=(train.py $larger_muon
               --arm "off: matrix_learning_rate=2.5e-3"
               --arm "off-slow: matrix_learning_rate=1.25e-3"
               --arm "paper: matrix_learning_rate=2.5e-3 precond=True"
               --arm "half-grad: matrix_learning_rate=1.25e-3 $half"
               --first_seed=11 --seeds=5) ;;
    characters_384_adamw)
        words=(train.py $adamw $larger --max_iters=500 --eval_interval=250 "${few[@]}"
               --tune learning_rate=5e-4,1e-3,2e-3,4e-3 --tune_seeds=1 --seeds=5) ;;
    listops_softmax | listops_nystrom | listops_linear) listops "${1#listops_}" adamw ;;
    listops_softmax_muon) listops softmax muon "${matrices[@]}" ;;
    listops_nystrom_muon)  # without paper-sqrt_d, to fit into an hour
        arms=("${few[@]}")
        listops nystrom muon "${matrices[@]}" ;;
    listops_linear_muon) listops linear muon "${matrices[@]}" ;;
    # The whole preset: two hours and a half. The kept compare.json names options that the preset
    # had not yet.
    listops_full)
        words=(train_lra.py config/lra_listops.toml --attention=nystrom
               --arm "off:" --arm "paper: precond=True"
               --arm "paper-slow: precond=True learning_rate=1e-3"
               --arm "paper-fast: precond=True learning_rate=4e-3"
               --arm "off-slow: learning_rate=1e-3" --arm "off-fast: learning_rate=4e-3"
               --seeds=1) ;;
    # At the literature's rate, for its steps. The kept compare.json is from when these were the
    # preset's, which its own command does not name.
    listops_full_slow)
        words=(train_lra.py config/lra_listops.toml --attention=nystrom --max_iters=5000
               --warmup_iters=1000 --learning_rate=1e-4 --embedding_std=1 --eval_interval=500
               --arm "off:" --arm "paper: precond=True" --seeds=1) ;;
    pathfinder_softmax) pathfinder softmax 1000 ;;
    pathfinder_nystrom) pathfinder nystrom 600 ;;
    pathfinder_softmax_adamw)
        words=(train_lra.py $pathfinder_adamw "${arms[@]}"
               --tune learning_rate=1e-3,2e-3,4e-3,8e-3 --tune_seeds=2 --seeds=5) ;;
    # The confirmations ask once more where half-grad led on every seed: at the rates tuned there,
    # on other seeds; on Pathfinder with the baseline at half-grad's rate as well.
    listops_confirm)
        words=(train_lra.py listops --attention=nystrom --max_iters=2000 --optimizer=adamw
               --learning_rate=4e-3 --arm "off:" --arm "half-grad: $half"
               --first_seed=11 --seeds=10) ;;
    pathfinder_confirm)
        words=(train_lra.py pathfinder --max_iters=1000 --matrix_learning_rate=1e-2
               --arm "off: learning_rate=5e-4" --arm "off-slow: learning_rate=2.5e-4"
               --arm "half-grad: learning_rate=2.5e-4 $half" --first_seed=11 --seeds=10) ;;
    pathfinder_confirm_adamw)
        words=(train_lra.py $pathfinder_adamw --learning_rate=2e-3
               --arm "off:" --arm "half-grad: $half" --arm "off-fast: learning_rate=4e-3"
               --first_seed=11 --seeds=10) ;;
    characters_confirm)
        words=(train.py $adamw --max_iters=500 --eval_interval=125 --learning_rate=6e-3
               --arm "off:" --arm "half-grad: $half" --first_seed=11 --seeds=20) ;;
    # The whole presets: off at their own rates, the others at the best of the 500, 750 and 400
    # steps, where these are not the same.
    classify_whole) whole classify "paper:" "half-grad: matrix_learning_rate=2.5e-3" ;;
    detect_whole) whole detect "paper:" "half-grad:" ;;
    segment_whole)
        whole segment "paper: matrix_learning_rate=1e-2 learning_rate=4e-3" "half-grad:" ;;
    classify) images classify 500 adamw ;;
    detect) images detect 1500 adamw ;;
    segment) images segment 600 adamw ;;
    classify_muon) images classify 500 muon "${matrices[@]}" ;;
    detect_muon) images detect 750 muon "${matrices[@]}" ;;
    segment_muon) images segment 400 muon "${matrices[@]}" ;;
    *)
        echo "no study $1" >&2
        exit 2 ;;
    esac
}

if [ $# = 0 ]; then
    for name in kappa characters_{muon_short,adamw_short,confirm,muon,adamw} \
                characters_384{,_confirm,_adamw} \
                listops_{softmax,nystrom,linear}{,_muon} listops_{confirm,full,full_slow} \
                pathfinder_{softmax,confirm}{,_adamw} pathfinder_nystrom \
                {classify,detect,segment}{,_muon,_whole}; do
        if [ -e "results/$name.json" ]; then
            echo "$name (run)"
        else
            echo "$name"
        fi
    done
    exit
fi
study "$1"
out=out-study-$1
python compare.py "${words[@]}" --jobs="${JOBS:-2}" --out_dir="$out"
cp "$out/compare.json" "results/$1.json"
cp "$out/compare.md" "results/$1.md"
