#!/usr/bin/env bash
# All 30 runs of the paper, from nothing to its tables, unattended. Start it in this folder:
#
#   bash run_all.sh                      all stages: data, masks, train, attention, report
#   bash run_all.sh toy                  the same five losses x 2 on the embedded data
#   bash run_all.sh train report cub200  some stages, some datasets (or FOLDER with images/<class>/)
#   bash run_all.sh --dry-run            only prints the commands
#   LOSSES="contrastive triplet" SEEDS="42 43 44" bash run_all.sh cub200
#   GPUS="0 1 2 3" bash run_all.sh       one run a GPU at a time; default: all that are visible
#
#   bash run_all.sh data masks           under SLURM: first this, then a task a run, then the report
#   sbatch --array=0-29 --gres=gpu:1 --cpus-per-task=8 --mem=48G run_all.sh
#   sbatch --dependency=afterany:JOB run_all.sh report
#
# The same command again skips what is finished and goes on with what is not. A failure stops only
# what needs it; it is named at the end, and the exit code is 1. The variables DATA and RUNS name
# other folders than data and runs, FLAGS holds more flags for bgbias.py.
set -euo pipefail

: "${DATA:=data}" "${RUNS:=runs}" "${SEEDS:=42}" "${FLAGS:=}"
: "${LOSSES:=contrastive triplet multi_similarity arcface normalized_softmax}"
HUB=${TORCH_HOME:-${XDG_CACHE_HOME:-~/.cache}/torch}/hub/checkpoints  # where torch looks first
export CUDA_DEVICE_ORDER=PCI_BUS_ID  # number GPUs as nvidia-smi does

say() { echo "$(date +%H:%M:%S) $*"; }
die() { echo "run_all.sh: error: $*" >&2; exit 2; }

plan() {  # prints the jobs of $stage for $dataset, one a line: the name of its log, its command
    case $dataset in  # the rule of dataset_name() in bgbias.py
        cars196 | cub200 | sop | toy | backgrounds | weights | all) name=$dataset ;;
        *) name=$(basename "$(cd "$dataset" && pwd -P)")
            case $name in cars196 | cub200 | sop | toy) name+=-folder ;; esac ;;
    esac
    if grep -Eqs "^(data-$name|masks-$name-[0-9]+):" "$tmp/failed"; then return; fi
    case $stage-$dataset in
        data-cars196 | data-cub200 | data-sop | data-backgrounds | data-weights)
            echo "data-$dataset fetch $dataset" ;;
        masks-toy) ;;  # toy is written with its masks
        masks-*)
            for ((i = 1; i <= ${#gpus[@]}; i++)); do  # a share for each GPU
                echo "masks-$name-$i python masks.py --dataset $dataset --data $DATA" \
                    "--shard $i/${#gpus[@]}"
            done ;;
        train-* | attention-*)
            for seed in $SEEDS; do for loss in $LOSSES; do for kind in base bgaugment; do
                run=$name-$loss-$kind-s$seed
                if [ $kind = bgaugment ]; then augment=" --bgaugment"; else augment=; fi
                if [ "$stage" = train ]; then
                    echo "$run python bgbias.py --dataset $dataset --loss $loss$augment" \
                        "--seed $seed --data $DATA --runs $RUNS${FLAGS:+ $FLAGS}"
                else
                    echo "$run python eval_attention.py $RUNS/$run"
                fi
            done; done; done ;;
        report-*) echo "report python bgbias.py --report $RUNS" ;;
    esac
}

work() {  # work GPU: runs the plan's jobs on this GPU, except those that another has begun
    set +e  # when a job fails, the next one is still to be done
    export CUDA_VISIBLE_DEVICES=$1
    while read -r name command; do
        log=$RUNS/$name.log
        if [ "$stage" = attention ] && [ ! -e "$RUNS/$name/result.json" ]; then continue; fi
        mkdir "$tmp/$stage-$name" 2>>"$tmp/why" || continue
        say "$name: $stage on GPU $1, log in $log"
        # shellcheck disable=SC2086  # a command is several words
        if ($command) >>"$log" 2>&1 </dev/null; then
            say "$name: $stage is done"
        else
            reason="exit code $?, $(tail -n 1 "$log")"
            say "$name: FAILED, $reason"
            echo "$name: $reason" >>"$tmp/failed"
        fi
    done <"$tmp/plan"
}

stop() {  # stop EXIT_CODE: ends the workers and what they run, then this script
    exec 2>>"$tmp/why"  # bash reports each of them as "Terminated"
    for worker in $(jobs -p); do kill -- "-$worker" || true; done
    wait
    exit "$1"
}

fetch() {  # fetch DATASET: downloads it, unless it is there
    local dataset=$1
    case $dataset in
        cars196) [ "$(find -L "$DATA" -maxdepth 2 -name car_ims -o -name cars_train)" ] ||
            die "nobody serves it any more; put into $DATA/cars196 car_ims/, cars_annos.mat or" \
                "cars_train/, cars_test/, devkit/, cars_test_annos_withlabels.mat" ;;
        cub200) get "$DATA/CUB_200_2011" .tgz md5 97eceeb196236b17998738112f37df78 \
            https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz ;;
        sop) get "$DATA/Stanford_Online_Products" .zip md5 7f73d41a2f44250d4779881525aea32e \
            ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip ;;
        backgrounds) [[ $FLAGS == *--backgrounds* ]] ||  # no checksum of these is known
            get "$DATA/unsplash_backgrounds" .tar.gz md5 '' \
                https://github.com/LSX-UniWue/background-bias-in-dml/archive/HEAD.tar.gz ;;
        weights) [[ $FLAGS == *--weights* || $FLAGS == *--backbone* ]] ||
            get "$HUB/bn_inception-52deb4733.pth" '' sha256 52deb4733 \
                http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth ;;
    esac
}

get() {  # get PLACE SUFFIX SUM DIGITS URL: PLACE, or the archive PLACE.SUFFIX, unpacked to PLACE
    local place=$1 archive=$1$2 file=$1$2 url=$5 error
    if [ -e "$place" ] || [ -e "$DATA/$dataset/${place##*/}" ]; then return; fi
    if [ ! -e "$archive" ]; then  # otherwise the user has put it there
        file=$archive.part
        until error=$(curl -fsSL --create-dirs --connect-timeout 30 --speed-limit 1 \
            --speed-time 60 --retry 3 --continue-at - --output "$file" "$url" 2>&1); do
            [ $? = 33 ] || die "$url: ${error##*curl: }; try again, or put that file at $archive"
            rm "$file"  # 33: the server cannot go on with half a file, so begin again
        done
    fi
    [[ $("$3sum" <"$file") == "$4"* ]] ||
        die "$file: its $3 does not begin with $4; delete it, or put $url at $archive"
    if [ ! "$2" ]; then mv "$file" "$place"; return; fi
    rm -rf "$place.new"
    mkdir "$place.new"
    case $2 in  # neither writes outside of the folder it is given
        .zip) error=$(python -m zipfile -e "$file" "$place.new" 2>&1) ;;
        *) error=$(tar -xof "$file" -C "$place.new" 2>&1) ;;
    esac || die "$file: not unpacked, ${error##*$'\n'}; make room, or delete it"
    mv "$(find "$place.new" -type d -name "${place##*/}" -print -quit)" "$place" ||
        die "$file: has no folder ${place##*/}; delete it"
    rm -rf "$place.new" "$archive.part"
}

dry='' stages='' datasets=''
for word; do
    case $word in
        --dry-run) dry=1 ;;
        data | masks | train | attention | report) stages+=" $word" ;;
        cars196 | cub200 | sop | toy) datasets+=" $word" ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
        *[[:space:]]*) die "$word: a folder without spaces, please" ;;
        *) [ -d "$word/images" ] || die "$word: no stage, dataset or folder with images/<class>/"
            datasets+=" ${word%/}" ;;
    esac
done
[ -e bgbias.py ] || die "start it in the folder of bgbias.py"
[[ $DATA$RUNS != *[[:space:]]* ]] || die "DATA and RUNS: folders without spaces, please"
: "${datasets:= cars196 cub200 sop}"
task=${SLURM_ARRAY_TASK_ID:-}
if [ "$task" ]; then : "${stages:=train attention}"; fi
if [ ! "${GPUS:-}" ]; then
    ask_torch="import torch; print(*range(torch.cuda.device_count()))"
    GPUS=${CUDA_VISIBLE_DEVICES-$(python -c "$ask_torch")}
fi
read -ra gpus <<<"${GPUS//,/ }"
if [ ${#gpus[@]} = 0 ]; then gpus=(none); fi

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'stop 130' INT
trap 'stop 143' TERM
for stage in ${stages:-data masks train attention report}; do
    wanted=$datasets
    if [ "$stage" = report ]; then wanted=all; fi
    if [ "$stage" = data ] && [ "$datasets" != " toy" ]; then wanted+=" backgrounds weights"; fi
    for dataset in $wanted; do plan; done | sed -n "${task:+$((task + 1))}p" >"$tmp/plan"
    if [ "$task" ] && [ ! -s "$tmp/plan" ]; then die "--array: there is no run of number $task"; fi
    if [ "$dry" ]; then cut -d ' ' -f 2- "$tmp/plan"; continue; fi
    mkdir -p "$DATA" "$RUNS"
    rm -f "$RUNS/report.log"  # other logs grow, this one is shown
    set -m  # makes each worker a process group, so that stop() reaches what it runs too
    for gpu in "${gpus[@]}"; do work "$gpu" & done
    set +m
    wait
    if [ "$stage" = report ]; then cat "$RUNS/report.log"; fi
done

if [ -e "$tmp/failed" ]; then
    echo "failed; the same command tries again:" >&2
    sed 's/^/  /' "$tmp/failed" >&2
    exit 1
fi
