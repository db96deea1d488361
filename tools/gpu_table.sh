#!/usr/bin/env bash
# All that waits for a GPU, on one machine: the tests marked gpu, the benchmarks, and a table of ResNet-18 on CIFAR-10
# (image files in data/cifar10_images; see docs/data.md). Each part leaves a file in OUT when it is done and is left out
# where that file is; trainings go on from their last checkpoint.
#
#   bash tools/gpu_table.sh [PART...]        parts: tests benchmarks table; default: all
#
# Variables: OUT [work_dirs/gpu_table], PYTHON [python3], DATA [data/cifar10_images], SEEDS [0], ROWS [all rows],
# EPOCHS for each side of a training [30], SHORT=1 for the shortest form (tiny networks, few images: it shows that all of
# it runs), DEVICE [cuda; cpu with SHORT=1].
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-work_dirs/gpu_table} PYTHON=${PYTHON:-python3} DATA=${DATA:-data/cifar10_images} SEEDS=${SEEDS:-0}
EPOCHS=${EPOCHS:-30} SHORT=${SHORT:-0}
if [ "$SHORT" = 1 ]; then DEVICE=${DEVICE:-cpu} EPOCHS=2; else DEVICE=${DEVICE:-cuda}; fi
# name of the row, config, epochs in units of EPOCHS (half of the batches of a training in turns are the router's)
TABLE="
at_dense:baselines/at_dense_resnet18_cifar10_fast.py:1
at_sdense:baselines/at_sdense_resnet18_cifar10_fast.py:1
at_moe:baselines/at_moe_resnet18_cifar10_fast.py:1
advmoe_paper:advmoe_resnet18_cifar10_fast_paper.py:2
advmoe_reference:advmoe_resnet18_cifar10_fast_reference.py:1
advmoe_stabilised:advmoe_resnet18_cifar10_fast_stabilised.py:1
advmoe:advmoe_resnet18_cifar10_fast.py:2
"
ROWS=${ROWS:-$(echo "$TABLE" | cut -d: -f1 | xargs)}
# MMEngine would train on a GPU that it sees.
if [ "$DEVICE" = cpu ]; then export CUDA_VISIBLE_DEVICES=-1; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
case $DATA in *[[:space:]]*) echo "DATA=$DATA: a path without white space, please; make a link" >&2 && exit 2 ;; esac
# What is there must not pass for the same with other settings.
settings="FORMAT=2 DEVICE=$DEVICE SHORT=$SHORT EPOCHS=$EPOCHS DATA=$DATA"
before=$(cat "$OUT/settings" 2>/dev/null || echo 'settings that nobody wrote down')
if compgen -G "$OUT/*.done" >/dev/null && [ "$before" != "$settings" ]; then
    echo "$OUT holds parts made with $before, not with $settings: choose another OUT" >&2
    exit 2
fi
echo "$settings" >"$OUT/settings"

# run NAME COMMAND...: a part, once; what it prints goes to OUT/NAME.log, which becomes OUT/NAME.done at the end.
run() {
    local name=$1
    shift
    if [ -e "$OUT/$name.done" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    current=$name start=$SECONDS
    local ended=0
    "$@" >>"$OUT/$name.log" 2>&1 || ended=$?
    note_seconds
    current=
    if [ "$ended" = 0 ]; then
        mv "$OUT/$name.log" "$OUT/$name.done"
    else
        echo "   failed, see $OUT/$name.log:"
        tail -n 6 "$OUT/$name.log"
        failed="$failed $name"
    fi
}
failed= current=

# One line for each start of a part, of which a training that goes on has several; also where this script is stopped.
note_seconds() { if [ "$current" ]; then echo "$((SECONDS - start)) s" >>"$OUT/$current.log"; fi; }
trap note_seconds EXIT

tests() {
    local some=()
    if [ "$SHORT" = 1 ]; then some=(-k "test_routes_are_those_of_the_cpu"); fi
    run tests "$PYTHON" -m pytest -q tests/gpu --device "$DEVICE" ${some[@]+"${some[@]}"}
}

benchmarks() {
    local moe=(--num-experts 2 4 8 16) training=(--num-experts 2 4 8) many=(--num-experts 2 16) throughput=()
    if [ "$SHORT" = 1 ]; then
        local tiny=(--batch-size 4 --image-size 8 --rounds 1)
        moe=(--num-experts 2 "${tiny[@]}") training=(--num-experts 2 "${tiny[@]}") many=(--num-experts 2 3 "${tiny[@]}")
    fi
    if [ "$DEVICE" = cuda ]; then throughput=(throughput); fi
    local device=(--device "$DEVICE")
    run benchmark_moe "$PYTHON" tools/benchmarks/benchmark_moe.py "${device[@]}" "${moe[@]}" \
        --json "$OUT/benchmark_moe.json"
    run benchmark_training "$PYTHON" tools/benchmarks/benchmark_training.py parts masked "${device[@]}" \
        "${training[@]}" --json "$OUT/benchmark_training.json"
    run benchmark_experts "$PYTHON" tools/benchmarks/benchmark_training.py experts "${device[@]}" "${many[@]}" \
        --json "$OUT/benchmark_experts.json"
    if [ "$DEVICE" = cuda ]; then
        run benchmark_throughput "$PYTHON" tools/benchmarks/benchmark_training.py throughput "${device[@]}" \
            --batch-size 128 --json "$OUT/benchmark_throughput.json"
    fi
}

# Settings of a row, as key=value of --cfg-options.
options() {
    local name=$1 seed=$2 epochs=$3
    local images="dataset.type=ImageFolders dataset.data_root=$DATA"
    echo "randomness.seed=$seed train_cfg.max_epochs=$epochs train_cfg.val_interval=$epochs"
    # The one-cycle schedule and the averaging of weights, at this length. Joint training has no hook for turns.
    local peak=$(((epochs + 3) / 4)) scheduler schedulers=param_scheduler average=4
    case $name in advmoe*) schedulers="param_scheduler.experts param_scheduler.router" average=5 ;; esac
    for scheduler in $schedulers; do
        echo "$scheduler.0.end=$peak $scheduler.1.begin=$peak $scheduler.1.end=$((epochs + 1))"
        echo "$scheduler.1.T_max=$((epochs - peak > 0 ? epochs - peak : 1))"
    done
    echo "custom_hooks.$average.begin_epoch=$((epochs / 3))"
    for each in $images; do
        echo "train_dataloader.dataset.$each val_dataloader.$each test_dataloader.$each"
    done
    if [ "$SHORT" = 1 ]; then
        echo "train_dataloader.dataset.dataset.indices=64 val_dataloader.dataset.indices=16"
        echo "test_dataloader.dataset.indices=16 train_dataloader.batch_size=16"
        local network=model.backbone
        case $name in *moe) network=$network.backbone && echo "model.backbone.router.base_channels=2" ;; esac
        case $name in advmoe_*) network=$network.backbone && echo "model.backbone.router.base_channels=2" ;; esac
        echo "$network.base_channels=4 $network.stem_channels=4 model.head.in_channels=32"
        echo "test_cfg.attacks.pgd50.steps=2 val_cfg.attacks.pgd10.steps=1 val_cfg.attacks.routepgd10.steps=1"
    fi
}

table() {
    local row name config sides epochs
    for seed in $SEEDS; do
        for row in $TABLE; do
            IFS=: read -r name config sides <<<"$row"
            case " $ROWS " in *" $name "*) ;; *) continue ;; esac
            epochs=$((EPOCHS * sides))
            local folder=$OUT/${name}_$seed
            # shellcheck disable=SC2046
            run "train_${name}_$seed" "$PYTHON" tools/train.py "configs/$config" --work-dir "$folder" --resume \
                $(if [ "$DEVICE" = cuda ]; then echo --amp; fi) --cfg-options $(options "$name" "$seed" "$epochs")
            [ -e "$OUT/train_${name}_$seed.done" ] || continue
            # shellcheck disable=SC2046
            run "test_${name}_$seed" "$PYTHON" tools/test.py "configs/$config" "$folder/epoch_$epochs.pth" \
                --work-dir "$folder/test" --out "$OUT/outcomes_${name}_$seed" \
                $(if [ "$SHORT" = 1 ]; then echo --attacks pgd50; fi) --cfg-options $(options "$name" "$seed" "$epochs")
        done
    done
    run collect "$PYTHON" tools/gpu_table.py "$OUT" --device "$DEVICE" --epochs "$EPOCHS"
    # Rows may come later.
    rm -f "$OUT/collect.done"
}

for part in ${*:-tests benchmarks table}; do
    case $part in
    tests | benchmarks | table) "$part" ;;
    *) echo "$part is no part; allowed: tests benchmarks table" >&2 && exit 2 ;;
    esac
done
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
