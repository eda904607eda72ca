#!/usr/bin/env bash
# Does the paper's 30 runs unattended, from the downloads to the tables. Start it in this folder:
#
#   bash run_all.sh                      all stages: data, masks, train, attention, report
#   bash run_all.sh train report toy     some stages, some datasets (or FOLDER with images/<class>/)
#   bash run_all.sh data cars196         downloads a dataset, unless DATA has it in any layout
#   bash run_all.sh --dry-run            prints the commands, runs nothing
#   LOSSES="arcface triplet" SEEDS="42 43" GPUS="0 1" bash run_all.sh cub200
#
# The same command skips finished runs and resumes interrupted runs. Failures are listed at the end;
# they stop only what depends on them. These variables can be set:
#
#   variable   default              meaning
#   LOSSES     the paper's five     training losses
#   SEEDS      42                   seeds of all random numbers
#   VARIANTS   base bgaugment       add own for BGAugment with the backgrounds of other photos
#   GPUS       all visible GPUs     each GPU does one run at a time
#   DATA       data                 folder of the datasets
#   RUNS       runs                 folder of the runs and of their logs
#   FLAGS                           more flags for bgbias.py, such as "--epochs 50 --patience 5"
#
# SLURM: activate the environment first. DATA and RUNS must have one path on all nodes. An array has
# one task per run (--dry-run train prints them). A task requeues itself before its time limit.
#
#   bash run_all.sh data masks           the downloads need internet
#   sbatch --array=0-29 --gres=gpu:1 --cpus-per-task=8 --mem=48G -t 12:00:00 \
#       --signal=B:USR1@60 --requeue --open-mode=append run_all.sh
#   sbatch --dependency=afterany:JOB run_all.sh report
set -euo pipefail

LOSSES=${LOSSES:-contrastive triplet multi_similarity arcface normalized_softmax}
SEEDS=${SEEDS:-42}
VARIANTS=${VARIANTS:-base bgaugment}
DATA=${DATA:-data}
RUNS=${RUNS:-runs}
GPUS=${GPUS:-}
FLAGS=${FLAGS:-}
task=${SLURM_ARRAY_TASK_ID:-}  # the number of a run, counted from 0; empty without an array

say() {
    echo "$(date +%H:%M:%S) $*"
}

die() {
    echo "run_all.sh: error: $*" >&2
    exit 2
}

# ---- What the user wants -------------------------------------------------------------------------

read_words() {  # read_words WORDS: sets dry, stages and datasets from the command line
    local word
    dry=''
    stages=''
    datasets=''
    for word in "$@"; do
        case $word in
            -h | --help)
                sed -n '2,/^set/s/^# \{0,1\}//p' "$0"  # the comment at the top of this file
                exit
                ;;
            --dry-run) dry=yes ;;
            data | masks | train | attention | report) stages="$stages $word" ;;
            cars196 | cub200 | sop | toy) datasets="$datasets $word" ;;
            *[[:space:]]*) die "$word: spaces in the name; rename the folder" ;;
            *)
                if [ ! -d "$word/images" ]; then
                    die "$word: unknown; give a stage, a dataset or a FOLDER (-h)"
                fi
                datasets="$datasets ${word%/}"
                ;;
        esac
    done
    if [ ! "$datasets" ]; then
        datasets='cars196 cub200 sop'
    fi
    if [ ! "$stages" ] && [ "$task" ]; then
        stages='train attention'
    elif [ ! "$stages" ]; then
        stages='data masks train attention report'
    fi
}

wants() {  # wants STAGE: whether it is one of the stages
    [[ " $stages " == *" $1 "* ]]
}

check_request() {  # finds mistakes now, not after hours of downloads
    local stage variant
    if [ ! -e bgbias.py ]; then
        die "bgbias.py: not in this folder; start run_all.sh in its own folder"
    fi
    if [[ $DATA$RUNS == *[[:space:]]* ]]; then
        die "DATA, RUNS: spaces in a name; give other folders"
    fi
    for variant in $VARIANTS; do
        flags_of "$variant" >/dev/null
    done
    if [ "$task" ]; then
        for stage in $stages; do
            case $stage in
                train | attention) ;;
                *) die "--array: it cannot do the stage $stage; submit $stage without --array" ;;
            esac
        done
    fi
}

choose_gpus() {  # sets gpus: what the user chose, else all that torch sees, else none
    local visible
    visible=$(python -c 'import torch; print(*range(torch.cuda.device_count()))' 2>/dev/null) ||
        die "python: torch is missing; activate the environment, or install requirements.txt"
    gpus=${GPUS:-${CUDA_VISIBLE_DEVICES-$visible}}
    gpus=${gpus//,/ }
    if [ ! "$gpus" ]; then
        gpus=none  # CUDA_VISIBLE_DEVICES=none hides all GPUs; one run at a time uses the CPU
        warn_without_gpu
    fi
    export CUDA_DEVICE_ORDER=PCI_BUS_ID  # numbers GPUs as nvidia-smi does
}

warn_without_gpu() {
    if wants train && [ "${datasets# }" != toy ] && [[ $FLAGS != *--epochs* ]]; then
        say "no GPU: a run with the paper's settings takes days"
    fi
}

# ---- Jobs: each GPU does one at a time -----------------------------------------------------------

make_scratch() {  # makes a temporary folder with the list of failures
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    failures=$scratch/failures
    touch "$failures"
}

open_queue() {  # makes the queue of free GPUs: a job takes one from it, and returns it at its end
    local gpu
    mkfifo "$scratch/free_gpus"
    exec 3<>"$scratch/free_gpus"
    for gpu in $gpus; do
        echo "$gpu" >&3
    done
}

job() {  # job NAME COMMAND: waits for a free GPU, and starts the command in the background
    local name=$1 gpu
    shift
    if [ "$dry" ]; then
        echo "$*"
        return
    fi
    read -r gpu <&3
    set -m  # gives the job its own process group, so that end_jobs() also ends its children
    work "$gpu" "$name" "$@" &
    set +m
}

work() {  # work GPU NAME COMMAND: runs the command, records a failure, and returns the GPU
    local gpu=$1 name=$2 log=$RUNS/$2.log code reason
    shift 2
    say "$name: $stage on GPU $gpu, log in $log"
    export CUDA_VISIBLE_DEVICES=$gpu
    set +e  # A failed command must not end this function, which returns the GPU.
    (set -e; "$@") >>"$log" 2>&1 </dev/null
    code=$?
    if [ "$code" = 0 ]; then
        say "$name: $stage is done"
    else
        reason="exit code $code"
        if [ "$code" = 137 ]; then
            reason="$reason (killed, perhaps out of memory)"
        fi
        reason="$stage FAILED, $reason, $(tail -n 1 "$log")"
        say "$name: $reason"
        echo "$name: $reason" >>"$failures"
    fi
    echo "$gpu" >&3
}

has_failed() {  # has_failed NAME: whether the job of this name has failed
    local name
    while read -r name _; do
        if [ "$name" = "$1:" ]; then
            return 0
        fi
    done <"$failures"
    return 1
}

end_jobs() {  # ends all jobs and their children
    local process
    say "stopped; the same command resumes"
    exec 2>/dev/null  # Bash would print "Terminated" for each job.
    for process in $(jobs -p); do
        kill -- "-$process" || true  # The minus sign means the process group.
    done
    wait
}

stop() {
    end_jobs
    exit 130
}

requeue() {  # SLURM sends USR1 before the time limit: see the sbatch command above
    end_jobs
    if [ "${SLURM_JOB_ID:-}" ]; then
        scontrol requeue "$SLURM_JOB_ID" || say "job $SLURM_JOB_ID: not requeued; submit it again"
    fi
    exit 130
}

# ---- Downloads -----------------------------------------------------------------------------------

# Stanford's own addresses of Cars196 are dead. This is a copy in torchvision's layout.
CARS196=https://www.kaggle.com/api/v1/datasets/download/rickyyyyyyy/torchvision-stanford-cars
CUB200=https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz
SOP=ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip
BACKGROUNDS=https://github.com/LSX-UniWue/background-bias-in-dml/archive/HEAD.tar.gz

list_downloads() {  # what the paper's datasets need; toy and a FOLDER need nothing
    local dataset needed=''
    for dataset in $datasets; do
        case $dataset in
            cars196 | cub200 | sop)
                echo "$dataset"
                needed='backgrounds weights u2net'
                ;;
        esac
    done
    echo "$needed"
}

fetch() {  # fetch WHAT: downloads it, unless it exists
    if exists "$1"; then
        return
    fi
    case $1 in
        cars196) get_folder stanford_cars .zip unknown "$CARS196" ;;
        cub200) get_folder CUB_200_2011 .tgz 97eceeb196236b17998738112f37df78 "$CUB200" ;;
        sop) get_folder Stanford_Online_Products .zip 7f73d41a2f44250d4779881525aea32e "$SOP" ;;
        backgrounds) get_folder unsplash_backgrounds .tar.gz unknown "$BACKGROUNDS" ;;
        weights) python -c "import bgbias; bgbias.Embedder('bninception', 'imagenet', 224)" ;;
        u2net) python -c "import rembg; rembg.new_session('u2net')" ;;
    esac
}

exists() {  # exists WHAT: whether it need not be downloaded
    local root
    case $1 in
        cars196 | cub200 | sop)
            root=$(root_of "$1") || exit 1  # bgbias.py does not work, and the log says why
            [ "$root" ]
            ;;
        backgrounds) [ -e "$DATA/unsplash_backgrounds" ] || [[ $FLAGS == *--backgrounds* ]] ;;
        weights) [[ $FLAGS == *--weights* || $FLAGS == *--backbone* ]] ;;
        u2net) [ -e "${U2NET_HOME:-$HOME/.u2net}/u2net.onnx" ] ;;
    esac
}

root_of() {  # root_of DATASET: where bgbias.py finds it in DATA, in any layout; nothing if missing
    python -c '
import sys
import bgbias
try:
    print(bgbias.dataset_root(*sys.argv[1:]))
except bgbias.UserError as error:
    print(error, file=sys.stderr)
' "$1" "$DATA"
}

get_folder() {  # get_folder FOLDER SUFFIX MD5 URL: makes FOLDER in DATA from FOLDER.SUFFIX
    local folder=$DATA/$1 archive=$DATA/$1$2
    if [ -e "$folder" ]; then
        die "$folder: exists, but files are missing in it; rename it"
    fi
    if [ ! -e "$archive" ]; then
        download "$4" "$archive"
    fi
    check_archive "$archive" "$3"
    unpack "$archive" "$1"
}

download() {  # download URL FILE: resumes FILE.part if it exists
    local code=0
    curl -fsSL --connect-timeout 30 --speed-limit 1 --speed-time 60 --retry 3 \
        --continue-at - --output "$2.part" "$1" || code=$?
    if [ "$code" = 33 ]; then
        rm "$2.part"  # The server cannot resume it, so the next try starts at its beginning.
    fi
    if [ "$code" != 0 ]; then
        die "$1: the download failed; if it fails again, save that file as $2"
    fi
    mv "$2.part" "$2"
}

check_archive() {  # check_archive ARCHIVE MD5: ends in an error if the archive is damaged
    local md5
    if [ "$2" = unknown ]; then
        if ! is_readable "$1"; then
            rm "$1"
            die "$1: it was damaged, so it is deleted; start again to download it again"
        fi
        return
    fi
    md5=$(md5_of "$1")
    if [ "$md5" != "$2" ]; then
        die "$1: its md5 is $md5 instead of $2; delete it"
    fi
}

is_readable() {  # is_readable ARCHIVE: reads all of it, and writes nothing that could fill the disk
    local test="zipfile.ZipFile(sys.argv[1]).testzip()"  # the name of a damaged file, or None
    case $1 in
        *.zip) python -c "import sys, zipfile; sys.exit($test)" "$1" ;;
        *) gzip -t "$1" ;;  # macOS's tar does not notice a wrong checksum
    esac
}

md5_of() {  # md5_of FILE: Python computes it, because macOS has no md5sum.
    local digest="hashlib.file_digest(sys.stdin.buffer, 'md5').hexdigest()"
    python -c "import hashlib, sys; print($digest)" <"$1"
}

unpack() {  # unpack ARCHIVE FOLDER: FOLDER appears in DATA when it is complete
    local hidden=$DATA/.unpacking-$2 found
    rm -rf "$hidden"  # An interrupted start may have left it.
    if ! python -c "import shutil, sys; shutil.unpack_archive(*sys.argv[1:])" "$1" "$hidden"; then
        rm -rf "$hidden"  # It may have filled the disk.
        exit 1
    fi
    for found in "$hidden/$2" "$hidden"/*/"$2"; do  # An archive of GitHub has it one folder deeper.
        if [ -d "$found" ]; then
            mv "$found" "$DATA/$2"
            break
        fi
    done
    rm -rf "$hidden"
    if [ ! -d "$DATA/$2" ]; then
        die "$1: it has no folder $2; unpack it by hand"
    fi
}

# ---- The runs: $dataset, $seed, $loss, $variant and $run come from the loops below ---------------

name_of() {  # name_of DATASET: the first part of its runs' names
    if [ -d "$1/images" ]; then
        (cd "$1" && basename "$PWD" | tr '\\:*?"<>|' '-')  # as bgbias.py does
    else
        echo "$1"
    fi
}

flags_of() {  # flags_of VARIANT: its flags for bgbias.py
    case $1 in
        base) ;;
        bgaugment) echo '--bgaugment' ;;
        own) echo '--bgaugment own' ;;
        *) die "VARIANTS: $1 is unknown; give base, bgaugment or own" ;;
    esac
}

is_chosen() {  # is_chosen NUMBER: whether to do this run; a task of a SLURM array does only its own
    [ ! "$task" ] || [ "$task" = "$1" ]
}

train() {  # starts the training
    # shellcheck disable=SC2046,SC2086  # Flags are several words, or none.
    job "$run" python bgbias.py --dataset "$dataset" --loss "$loss" $(flags_of "$variant") \
        --seed "$seed" --data "$DATA" --runs "$RUNS" $FLAGS
}

attention() {  # starts the scoring; the star stands for the settings that FLAGS add to a name
    if [ "$dry" ] || is_trained "$run"; then
        job "$run" python eval_attention.py "$RUNS/$run/" "$RUNS/$run"-*/
    fi
}

is_trained() {  # is_trained RUN: whether it is finished, with any FLAGS
    compgen -G "$RUNS/$1/result.json" >/dev/null || compgen -G "$RUNS/$1-*/result.json" >/dev/null
}

report() {  # prints the tables of all runs
    if [ "$dry" ]; then
        echo "python bgbias.py --report $RUNS"
    else
        python bgbias.py --report "$RUNS" || echo "report: exit code $?" >>"$failures"
    fi
}

# ---- The stages ----------------------------------------------------------------------------------

read_words "$@"
check_request
trap stop HUP INT TERM USR2
trap requeue USR1
make_scratch
if [ ! "$dry" ]; then
    choose_gpus
    open_queue
    mkdir -p "$DATA" "$RUNS"
fi

stage=data  # The messages of a job name its stage.
if wants data; then
    for what in $(list_downloads); do
        job "data-$what" fetch "$what"
    done
    wait
fi

stage=masks
if wants masks; then
    for dataset in $datasets; do
        name=$(name_of "$dataset")
        if [ "$dataset" = toy ] || has_failed "data-$name"; then
            continue  # Toy is drawn with its masks. Without photos, there are no masks.
        fi
        job "masks-$name" python masks.py --dataset "$dataset" --data "$DATA"
    done
    wait
fi

for stage in train attention; do
    if ! wants "$stage"; then
        continue
    fi
    number=0  # of the run, for SLURM
    for dataset in $datasets; do
        name=$(name_of "$dataset")
        if has_failed "data-$name" || has_failed "masks-$name"; then
            continue
        fi
        for seed in $SEEDS; do
            for loss in $LOSSES; do
                for variant in $VARIANTS; do
                    run=$name-$loss-$variant-s$seed
                    if is_chosen "$number"; then
                        "$stage"  # train or attention, see above
                    fi
                    number=$((number + 1))
                done
            done
        done
    done
    if [ "$task" ] && [ "$task" -ge "$number" ]; then
        die "--array: run $task does not exist; the last one is $((number - 1))"
    fi
    wait
done

if wants report; then
    report
fi

if [ -s "$failures" ]; then
    echo "failed; the same command tries again:" >&2
    sed 's/^/  /' "$failures" >&2
    exit 1
fi
