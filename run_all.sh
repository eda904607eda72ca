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
#   sbatch --array=0-29 --gres=gpu:1 --cpus-per-task=8 --mem=48G --signal=B:TERM@120 run_all.sh
#   sbatch --dependency=afterany:JOB run_all.sh report
#
# The same command again skips what is finished and goes on with what is not. What fails does not
# stop the rest; it is named at the end, and the exit code is 1. DATA, RUNS and FLAGS (more of them
# for bgbias.py) can be set too, and for mirrors CUB_URL, SOP_URL, PHOTOS_URL, WEIGHTS_URL, file://
# too, with CUB_MD5, SOP_MD5, PHOTOS_MD5, WEIGHTS_SHA256.
set -euo pipefail
shopt -s nullglob

DATA=${DATA:-data} RUNS=${RUNS:-runs} SEEDS=${SEEDS:-42} FLAGS=${FLAGS:-}
LOSSES=${LOSSES:-contrastive triplet multi_similarity arcface normalized_softmax}
EVERY=${EVERY:-1800}  # seconds between two estimates of what is left
HUB=${TORCH_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/torch}/hub/checkpoints  # where torch looks first

die() { echo "run_all.sh: error: $*" >&2; exit 2; }
say() { echo "$(date +%H:%M:%S) $*"; }
failed() { say "$1: FAILED, $2" && echo "$1: $2" >>"$tmp/failed"; }

# ---- The stages, of a dataset or of a run: $dataset $loss $kind $seed $name ----------------------

data() {  # what can be had; no checksum is known of the authors' backgrounds
    local repository=background-bias-in-dml
    case $dataset in
        cub200) fetch "$DATA/CUB_200_2011" tar md5 "${CUB_MD5-97eceeb196236b17998738112f37df78}" \
            "${CUB_URL:-https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz}" ;;
        sop) fetch "$DATA/Stanford_Online_Products" zip \
            md5 "${SOP_MD5-7f73d41a2f44250d4779881525aea32e}" \
            "${SOP_URL:-ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip}" ;;
        cars196) [ "$dry" ] || [ "$(find -L "$DATA" -maxdepth 2 \
            \( -name car_ims -o -name cars_train \) -print -quit)" ] ||
            die "nobody serves cars196 any more; put into $DATA/cars196 car_ims/, cars_annos.mat" \
                "or cars_train/, cars_test/, devkit/, cars_test_annos_withlabels.mat" ;;
        unsplash_backgrounds) [[ $FLAGS == *--backgrounds* ]] ||
            fetch "$DATA/$dataset" tar md5 "${PHOTOS_MD5-}" \
                "${PHOTOS_URL:-https://github.com/LSX-UniWue/$repository/archive/HEAD.tar.gz}" ;;
        bn_inception-*) [[ $FLAGS == *--weights* || $FLAGS == *--backbone* ]] ||
            fetch "$HUB/$dataset" '' sha256 "${WEIGHTS_SHA256-52deb4733}" \
                "${WEIGHTS_URL:-http://data.lip6.fr/cadene/pretrainedmodels/$dataset}" ;;
    esac
}

masks() {  # a share for every GPU
    if [ "$dataset" = toy ]; then return; fi
    for ((i = 1; i <= gpus; i++)); do
        job "masks-$folder-$i" \
            python masks.py --dataset "$dataset" --data "$DATA" --shard "$i/$gpus"
    done
}

train() {
    if [ "$kind" = base ]; then augment=; else augment=--bgaugment; fi
    # shellcheck disable=SC2086  # several words, or none
    job "$name" python bgbias.py --dataset "$dataset" --loss "$loss" $augment --seed "$seed" \
        --data "$DATA" --runs "$RUNS" $FLAGS
}

attention() {
    local run=$RUNS/$name
    if [ ! "$dry" ] && [[ ! -e $run/result.json || -e $run/attention.json ]]; then return; fi
    job "$name" python eval_attention.py "$run"
}

report() {
    if [ "$dry" ]; then echo "python bgbias.py --report $RUNS"; return; fi
    python bgbias.py --report "$RUNS" 2>"$tmp/why" || failed report "$(<"$tmp/why")"
}

# ---- What they need ------------------------------------------------------------------------------

fetch() {  # fetch PATH ARCHIVE SUM DIGITS URL: PATH is there, verified, or this dies
    if [ -e "$1" ] || [ -e "$DATA/$dataset/${1##*/}" ]; then return; fi
    if [ "$dry" ]; then echo "curl -fL -C - -o $1.part $5"; return; fi
    say "fetching $5"
    mkdir -p "${1%/*}"
    get() { curl -fsSL --connect-timeout 30 -Y 1 -y 60 --retry 3 -C - -o "$1.part" "$5" 2>&1; }
    error=$(get "$@") || { [ $? = 33 ] && rm "$1.part" && error=$(get "$@"); } ||  # 33: no resuming
        die "$5 to $1.part: ${error##*curl: }; mend that and try again, or set another URL"
    [[ $("$3sum" <"$1.part") == "$4"* ]] || { rm "$1.part" &&
        die "$5: its $3 does not begin with $4, deleted; try again, or set another URL"; }
    if [ ! "$2" ]; then mv "$1.part" "$1"; return; fi
    rm -rf "$1.d" && mkdir "$1.d"
    error=$("unpack_$2" "$1.part" "$1.d" 2>&1) ||
        die "$1.part: not unpacked, ${error##*$'\n'}; make room, or delete it"
    found=$(find "$1.d" -type d -name "${1##*/}" -print -quit)
    [ "$found" ] || die "$1.part: has no folder ${1##*/}; delete it and set another URL"
    mv "$found" "$1" && rm -r "$1.d" "$1.part"
}

unpack_tar() { tar -xof "$1" -C "$2"; }  # neither lets a file out of the folder
unpack_zip() { python -m zipfile -e "$1" "$2"; }

job() {  # job NAME COMMAND...: on the next free GPU, with its own log
    if [ "$dry" ]; then echo "${*:2}"; return; fi
    until read -r -t "$EVERY" gpu <&3; do cost || true; done
    say "$1: $3 on GPU $gpu, log in $RUNS/$1.log"
    set -m  # a process group of its own, which stop() reaches whole
    (
        trap exit TERM  # once the command has saved its state and ended
        if CUDA_VISIBLE_DEVICES=$gpu "${@:2}" >>"$RUNS/$1.log" 2>&1; then say "$1: $3 is done"
        else failed "$1" "$(tail -n 1 "$RUNS/$1.log")"; fi
        echo "$gpu" >&3
    ) 2>"$tmp/why" &  # where bash says "Terminated"
    set +m
}

stop() { for group in $(jobs -p); do kill -- "-$group" || true; done; wait; exit 143; }

cost() {  # what all of it takes, a line a dataset, and from the first epochs on how many hours more
    for set in $datasets; do
        each=0.25  # GB, of a run of BN-Inception
        case $set in  # GB: photos and masks; a folder's photos are there already
            cars196) size="16,185 images, 2.3" ;; cub200) size="11,788 images, 1.4" ;;
            sop) size="120,053 images, 4.8" ;; toy) size="3,400 images, 0.1" each=0.01 ;;
            *) size="$(find -L "$set/images" -type f | wc -l) images, 0" ;;
        esac
        runs=0 files=()
        for run in "${all[@]}"; do if [[ $run == "$set "* ]]; then
            runs=$((runs + 1)) files+=("$RUNS/${run##* }"/{log.json[l],result.jso[n]})
        fi; done
        awk -F '"seconds": |"epochs": ' -v gpus="$gpus" -v runs="$runs" \
            -v what="$set: $size GB, and $runs runs of up to $each GB" '
            FILENAME ~ /log.jsonl$/ { seconds += $2; epochs++ }
            /^  "epochs": / { whole += $2; done++ }
            END {
                printf "%s, %d left: ", what, runs - done
                each = done ? whole / done : 16  # the fewest: 15 without a better one
                if (!epochs) print "hours not known before the first epochs"
                else printf "%.1f hours left, if a run takes %d epochs of %.1f s\n",
                    (runs - done) * each * seconds / epochs / gpus / 3600, each, seconds / epochs
            }' /dev/null "${files[@]}"
    done
}

# ---- Which of them, and for what -----------------------------------------------------------------

dry='' stages='' datasets='' all=()
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
datasets=${datasets:- cars196 cub200 sop}
for dataset in $datasets; do for seed in $SEEDS; do for loss in $LOSSES; do
    for kind in base bgaugment; do
        all+=("$dataset $loss $kind $seed ${dataset##*/}-$loss-$kind-s$seed")
    done
done; done; done
if [ "${SLURM_ARRAY_TASK_ID:-}" ]; then
    stages=${stages:-train attention}
    all=("${all[SLURM_ARRAY_TASK_ID]:?there is no run of this number}")
fi
: "${GPUS:=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1 |
    grep -E '^[0-9]+$')}}"
GPUS=${GPUS//,/ } GPUS=${GPUS:-none}
gpus=$(wc -w <<<"$GPUS")

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap stop INT TERM
mkfifo "$tmp/free"
exec 3<>"$tmp/free"  # holds the free GPUs: a job takes one out and puts it back
for gpu in $GPUS; do echo "$gpu" >&3; done
if [ ! "$dry" ]; then
    mkdir -p "$DATA" "$RUNS"
    cost || true
    df -Ph "$DATA" "$RUNS" | awk 'NR > 1 { print $4 " free on " $6 }' | uniq
fi

for stage in ${stages:-data masks train attention report}; do
    items=("${all[@]}")
    # shellcheck disable=SC2206  # datasets have no spaces
    case $stage in
        data | masks) items=($datasets) ;;
        report) items=("") ;;
    esac
    if [ "$stage" = data ] && [ "$datasets" != " toy" ]; then
        items+=(unsplash_backgrounds bn_inception-52deb4733.pth)
    fi
    for item in "${items[@]}"; do
        read -r dataset loss kind seed name <<<"$item"
        folder=${dataset##*/}
        if [ "$stage" = data ]; then
            set -m; (data) 2>"$tmp/why" & set +m
            wait $! || failed "data-$folder" "$(<"$tmp/why")"
        elif [ "$item" ] && grep -Eqs "^(data-$folder|masks-$folder-[0-9]+):" "$tmp/failed"; then
            say "${name:-$folder}: left out, its data or masks failed"
        else
            "$stage"
        fi
    done
    wait
done

if [ -e "$tmp/failed" ]; then
    echo "failed; the same command tries again:" >&2
    sed 's/^/  /' "$tmp/failed" >&2
    exit 1
fi
