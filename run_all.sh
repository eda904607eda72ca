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
#   sbatch --array=0-29 --gres=gpu:1 --signal=B:TERM@120 run_all.sh
#   sbatch --dependency=afterany:JOB run_all.sh report
#
# The same command again skips what is finished and goes on with what is not. What fails does not
# stop the rest; it is named at the end, and the exit code is 1. Every variable can be overridden.
set -euo pipefail

DATA=${DATA:-data} RUNS=${RUNS:-runs} SEEDS=${SEEDS:-42} EVERY=${EVERY:-1800} FLAGS=${FLAGS:-}
LOSSES=${LOSSES:-contrastive triplet multi_similarity arcface normalized_softmax}
# FLAGS: more of them for bgbias.py. EVERY: seconds between two estimates of what is left.

# What is fetched: URLs, file:// too, and the first digits of checksums. None is known for PHOTOS,
# a .tar.gz that has unsplash_backgrounds/{val,test} somewhere in it.
CUB_URL=${CUB_URL:-https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz}
SOP_URL=${SOP_URL:-ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip}
PHOTOS_URL=${PHOTOS_URL:-https://github.com/LSX-UniWue/background-bias-in-dml/archive/HEAD.tar.gz}
WEIGHTS_URL=${WEIGHTS_URL:-http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth}
CUB_MD5=${CUB_MD5-97eceeb196236b17998738112f37df78} PHOTOS_MD5=${PHOTOS_MD5-}
SOP_MD5=${SOP_MD5-7f73d41a2f44250d4779881525aea32e} WEIGHTS_SHA256=${WEIGHTS_SHA256-52deb4733}
HUB=${TORCH_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/torch}/hub/checkpoints  # where torch looks first

die() { echo "run_all.sh: error: $*" >&2; exit 2; }
say() { echo "$(date +%H:%M:%S) $*"; }
failed() { say "$1: FAILED, $2" && echo "$1: $2" >>"$tmp/failed"; }

fetch() {  # fetch FILE URL KIND DIGITS: FILE is there, whole and verified, or this dies
    if [ -e "$1" ]; then return; fi
    if [ "$dry" ]; then
        grep -qsF "$1" "$tmp/dry" || echo "curl -fL -C - -o $1 $2" | tee -a "$tmp/dry"
        return
    fi
    say "fetching $2"
    mkdir -p "$(dirname "$1")"
    get() { curl -fsSL --connect-timeout 30 -Y 1 -y 60 --retry 3 -C - -o "$1.part" "$2" 2>&1; }
    error=$(get "$@") || { [ $? = 33 ] && rm "$1.part" && error=$(get "$@"); } ||  # 33: no resuming
        die "$2 to $1: ${error##*curl: }; mend that and try again, or set its variable to another"
    if [[ $("$3sum" <"$1.part") != "$4"* ]]; then
        rm "$1.part"
        die "$2: its $3 does not begin with $4, deleted; try again, or set its variable to another"
    fi
    mv "$1.part" "$1"
}

unpacked() {  # unpacked ARCHIVE URL MD5: its folder, of the same name, is there, or this dies
    local archive=$DATA/$1 folder=${1%%.*} filter=data
    if [ -e "$DATA/$folder" ] || [ -e "$DATA/$dataset/$folder" ]; then return; fi
    fetch "$archive" "$2" md5 "$3"
    if [ "$dry" ]; then return; fi
    rm -rf "$archive.d"
    if [[ $1 == *.zip ]]; then filter=; fi  # leaves out what would leave the folder; tar refuses it
    error=$(python -c 'import shutil, sys
shutil.unpack_archive(*sys.argv[1:3], filter=sys.argv[3] or None)' \
        "$archive" "$archive.d" "$filter" 2>&1) ||
        die "$archive: not unpacked, ${error##*$'\n'}; make room, or delete it"
    found=$(find "$archive.d" -type d -name "$folder" -print -quit)
    [ "$found" ] || die "$archive: has no folder $folder; delete it and set its variable to another"
    mv "$found" "$DATA/$folder" && rm -r "$archive.d" "$archive"
}

data() {
    case $dataset in
        toy) return ;;  # bgbias.py draws it
        cub200) unpacked CUB_200_2011.tgz "$CUB_URL" "$CUB_MD5" ;;
        sop) unpacked Stanford_Online_Products.zip "$SOP_URL" "$SOP_MD5" ;;
        cars196) [ "$dry" ] || [ -e "$DATA/car_ims" ] || [ -e "$DATA/cars_train" ] ||
            [ -e "$DATA/cars196" ] || [ -e "$DATA/stanford_cars" ] ||
            die "nobody serves cars196 any more; put into $DATA/cars196 car_ims/, cars_annos.mat" \
                "or cars_train/, cars_test/, devkit/, cars_test_annos_withlabels.mat" ;;
    esac
    unpacked unsplash_backgrounds.tar.gz "$PHOTOS_URL" "$PHOTOS_MD5"
    [[ $FLAGS == *--weights* ]] || fetch "$HUB/bn_inception-52deb4733.pth" "$WEIGHTS_URL" \
        sha256 "$WEIGHTS_SHA256"
}

masks() {  # a share for every GPU
    if [ "$dataset" = toy ]; then return; fi
    for ((i = 1; i <= gpus; i++)); do
        job "masks-${dataset##*/}-$i" \
            python masks.py --dataset "$dataset" --data "$DATA" --shard "$i/$gpus"
    done
}

train() {
    if [ -e "$RUNS/$name/result.json" ]; then
        [ "$dry" ] || say "$name: is done"
        return
    fi
    local augment=
    if [ "$kind" = bgaugment ]; then augment=--bgaugment; fi
    # shellcheck disable=SC2086  # several words, or none
    job "$name" python bgbias.py --dataset "$dataset" --loss "$loss" $augment --seed "$seed" \
        --data "$DATA" --runs "$RUNS" $FLAGS
}

attention() {
    if [ ! "$dry" ] && [ ! -e "$RUNS/$name/result.json" ]; then return; fi
    job "$name" python eval_attention.py "$RUNS/$name"
}

report() {
    if [ "$dry" ]; then echo "python bgbias.py --report $RUNS"; return; fi
    if python bgbias.py --report "$RUNS" >"$tmp/report.md" 2>"$tmp/why"; then
        mv "$tmp/report.md" "$RUNS/report.md"
        cat "$RUNS/report.md"
    else failed report "$(<"$tmp/why")"; fi
}

job() {  # job NAME COMMAND...: on the next free GPU, with its own log
    if [ "$dry" ]; then echo "${*:2}"; return; fi
    until read -r -t "$EVERY" gpu <&3; do cost; done
    say "$1: $3 on GPU $gpu, log in $RUNS/$1.log"
    set -m  # a process group of its own, which stop() reaches whole
    (
        trap exit TERM  # once the command has saved its state and ended, and without a word
        if CUDA_VISIBLE_DEVICES=$gpu "${@:2}" >>"$RUNS/$1.log" 2>&1; then say "$1: $3 is done"
        else failed "$1" "$(tail -n 1 "$RUNS/$1.log")"; fi
        echo "$gpu" >&3
    ) &
    set +m
}

stop() { for group in $(jobs -p); do kill -- "-$group" || true; done; wait; exit 143; }

cost() {  # a line a dataset: what all of it takes, what is left
    for set in $datasets; do
        runs=0 left=0 size="? 0 0.25"  # images; GB of photos and masks, of a run's checkpoints
        for run in "${all[@]}"; do
            if [[ $run != "$set "* ]]; then continue; fi
            runs=$((runs + 1))
            if [ ! -e "$RUNS/${run##* }/result.json" ]; then left=$((left + 1)); fi
        done
        case $set in
            cars196) size="16,185 2.3 0.25" ;; cub200) size="11,788 1.4 0.25" ;;
            sop) size="120,053 4.8 0.25" ;; toy) size="3,400 0.1 0.01" ;;
        esac
        awk -F '"seconds": |"epochs": ' -v words="$set $runs $left $size $gpus" '
            FILENAME ~ /log.jsonl$/ { seconds += $2; epochs++ }
            /^  "epochs": / { whole += $2; done++ }
            END {
                split(words, w, " ")
                printf "%s: %d runs, %d left, %s images, ", w[1], w[2], w[3], w[4]
                printf "about %.1f GB of disk\n", w[5] + w[2] * w[6]
                if (!epochs) { print "    hours: not known before the first epochs"; exit }
                each = done ? whole / done : 16  # the fewest: 15 without a better one
                printf "    %.1f hours left, if a run takes %d epochs of %.1f s\n",
                    w[3] * each * seconds / epochs / w[7] / 3600, each, seconds / epochs
            }' /dev/null "$RUNS/${set##*/}"-*/{log.jsonl,result.json}
    done
}

dry='' stages='' datasets='' all=()
for word; do
    case $word in
        --dry-run) dry=1 ;;
        data | masks | train | attention | report) stages+=" $word" ;;
        cars196 | cub200 | sop | toy) datasets+=" $word" ;;
        *) [ -d "$word/images" ] || die "$word: no stage, dataset or folder with images/<class>/"
            datasets+=" ${word%/}" ;;
    esac
done
datasets=${datasets:-cars196 cub200 sop}
for dataset in $datasets; do for seed in $SEEDS; do for loss in $LOSSES; do
    for kind in base bgaugment; do
        all+=("$dataset $loss $kind $seed ${dataset##*/}-$loss-$kind-s$seed")
    done
done; done; done
if [ "${SLURM_ARRAY_TASK_ID:-}" ]; then
    stages=${stages:-train attention}
    all=("${all[SLURM_ARRAY_TASK_ID]:?there is no run of this number}")
fi
: "${GPUS:=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1 |
    grep -E '^[0-9]+$' || echo none)}}"
GPUS=${GPUS//,/ }
gpus=$(wc -w <<<"$GPUS")

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap stop INT TERM
mkfifo "$tmp/free"
exec 3<>"$tmp/free"  # holds the free GPUs: a job takes one out and puts it back
for gpu in $GPUS; do echo "$gpu" >&3; done
shopt -s nullglob
if [ ! "$dry" ]; then
    mkdir -p "$DATA" "$RUNS"
    cost
    df -Ph "$DATA" "$RUNS" | awk 'NR > 1 { print $4 " free on " $6 }' | uniq
fi

for stage in ${stages:-data masks train attention report}; do
    if [ "$stage" = report ]; then report; continue; fi
    items=("${all[@]}")
    # shellcheck disable=SC2206  # datasets have no spaces
    if [ "$stage" = data ] || [ "$stage" = masks ]; then items=($datasets); fi
    for item in "${items[@]}"; do
        read -r dataset loss kind seed name <<<"$item"
        if grep -Eqs "^(data|masks)-${dataset##*/}[-:]" "$tmp/failed"; then continue; fi
        if [ "$stage" = data ]; then
            (data) 2>"$tmp/why" || failed "data-${dataset##*/}" "$(<"$tmp/why")"
        else "$stage"; fi
    done
    wait
done

if [ -e "$tmp/failed" ]; then
    echo "failed; the same command tries again:" >&2
    sed 's/^/  /' "$tmp/failed" >&2
    exit 1
fi
