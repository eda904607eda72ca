#!/usr/bin/env bash
# Does the paper's 30 runs unattended, from the downloads to the tables. Start it in this folder:
#
#   bash run_all.sh                      all stages: data, masks, train, attention, report
#   bash run_all.sh train report toy     some stages, some datasets (or FOLDER with images/<class>/)
#   bash run_all.sh --dry-run            prints the commands, runs nothing
#   LOSSES="arcface triplet" SEEDS="42 43" GPUS="0 1" bash run_all.sh cub200
#
# Each GPU (default: all visible GPUs) does one run at a time. The same command skips finished runs
# and resumes interrupted runs. Failures are listed at the end; they stop only what depends on them.
# DATA and RUNS replace data/ and runs/. FLAGS has more flags for bgbias.py: "--backgrounds own".
#
# SLURM: activate the environment first. DATA and RUNS must have one path on all nodes. An array has
# one task per run (--dry-run train prints them). A task requeues itself before its time limit.
#
#   bash run_all.sh data masks           the downloads need internet
#   sbatch --array=0-29 --gres=gpu:1 --cpus-per-task=8 --mem=48G -t 12:00:00 \
#       --signal=B:USR1@60 --requeue --open-mode=append run_all.sh
#   sbatch --dependency=afterany:JOB run_all.sh report
set -euo pipefail
say() { echo "$(date +%H:%M:%S) $*"; }
die() { echo "run_all.sh: error: $*" >&2; exit 2; }

plan() {  # prints the jobs of $stage for $dataset, one per line: NAME COMMAND, NAME.log is the log
    local name=$dataset seed loss augment variant run
    if [ -d "$dataset/images" ]; then name=$(cd "$dataset" && basename "$PWD"); fi
    if grep -Fq -e "  data-$name: " -e "  masks-$name: " <<<"$failed"; then return; fi
    case $stage-$dataset in
        data-cub200 | data-sop | data-backgrounds | data-weights | data-u2net)
            echo "data-$dataset fetch $dataset" ;;
        data-* | masks-toy) ;;  # Cars196 has no address, a FOLDER exists, toy is drawn with masks
        masks-*) echo "masks-$name python masks.py --dataset $dataset --data $DATA" ;;
        train-* | attention-*)
            for seed in $SEEDS; do for loss in $LOSSES; do for augment in "" " --bgaugment"; do
                variant=${augment:+bgaugment}
                run=$name-$loss-${variant:-base}-s$seed
                if [ "$stage" = attention ]; then
                    echo "$run python eval_attention.py $RUNS/$run/ $RUNS/$run-*/"  # *: see FLAGS
                else
                    echo "$run python bgbias.py --dataset $dataset --loss $loss$augment" \
                        "--seed $seed --data $DATA --runs $RUNS${FLAGS:+ $FLAGS}"
                fi
            done; done; done ;;
    esac
}

work() {  # work GPU NAME COMMAND: runs a job, then returns the GPU and the error, if any
    local log=$RUNS/$2.log reason=
    say "$2: $stage on GPU $1, log in $log"
    # shellcheck disable=SC2048  # unquoted, so that the * of attention expands
    (CUDA_VISIBLE_DEVICES=$1 ${*:3}) >>"$log" 2>&1 </dev/null ||
        reason="$2: $stage FAILED, exit code $?, $(tail -n 1 "$log" 2>&1 || true)"
    reason=${reason/code 137,/code 137 (killed, perhaps out of memory),}
    say "${reason:-$2: $stage is done}"
    echo "$1 $reason" >&3
}

next_gpu() {  # waits for a free GPU, sets gpu to it, and records the error of its last job
    read -r gpu reason <&3
    failed+=${reason:+  $reason$'\n'}
}

stop() {  # ends the jobs and their processes, then this script
    say "stopped; the same command resumes"
    exec 2>/dev/null  # bash would print "Terminated" for each job
    for job in $(jobs -p); do kill -- "-$job" || true; done
    wait
    [ ! "${1:-}" ] || scontrol requeue "$1" || true
    exit 130
}

fetch() {  # fetch WHAT: downloads it, unless it exists
    case $1 in
        cub200) get CUB_200_2011 .tgz 97eceeb196236b17998738112f37df78 \
            https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz ;;
        sop) get Stanford_Online_Products .zip 7f73d41a2f44250d4779881525aea32e \
            ftp://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip ;;
        backgrounds) [[ $FLAGS == *--backgrounds* ]] ||  # their checksum is unknown
            get unsplash_backgrounds .tar.gz '' \
                https://github.com/LSX-UniWue/background-bias-in-dml/archive/HEAD.tar.gz ;;
        weights) [[ $FLAGS == *--weights* || $FLAGS == *--backbone* ]] ||
            python -c "import bgbias; bgbias.Embedder('bninception', 'imagenet', 224)" ;;
        u2net) [ -e "${U2NET_HOME:-$HOME/.u2net}/u2net.onnx" ] ||
            python -c "import rembg; rembg.new_session('u2net')" ;;
    esac
}

get() {  # get FOLDER SUFFIX MD5 URL: makes the folder in DATA from its archive, FOLDER.SUFFIX
    local folder=$DATA/$1 archive=$DATA/$1$2 new=$DATA/$1.new
    if [ -e "$folder" ] || compgen -G "$DATA/*/$1" >/dev/null; then return; fi
    if [ ! -e "$archive" ]; then
        curl -fsSL --connect-timeout 30 --speed-limit 1 --speed-time 60 --retry 3 \
            --continue-at - --output "$archive.part" "$4" || {
            [ $? != 33 ] || rm "$archive.part"  # 33: the server cannot resume it
            die "$4: the download failed; try again, or save that file as $archive"; }
        mv "$archive.part" "$archive"
    fi
    [[ $(md5sum <"$archive") == "$3"* ]] || die "$archive: its md5 is not $3; delete it"
    python -c "import shutil, sys; shutil.unpack_archive(*sys.argv[1:])" "$archive" "$new" ||
        die "$archive: cannot be unpacked; delete it"
    mv "$(find "$new" -type d -name "$1" -print -quit)" "$folder"
    rm -r "$new"
}

trap stop HUP INT TERM USR2
trap 'stop "${SLURM_JOB_ID:-}"' USR1  # see SLURM above
: "${DATA:=data}" "${RUNS:=runs}" "${SEEDS:=42}" "${FLAGS:=}"
: "${LOSSES:=contrastive triplet multi_similarity arcface normalized_softmax}"
[ -e bgbias.py ] || die "bgbias.py: not in this folder; start run_all.sh in its own folder"
[[ $DATA$RUNS != *[[:space:]]* ]] || die "DATA, RUNS: spaces in a name; give other folders"
dry='' stages='' datasets='' failed=''
for word; do
    case $word in
        --dry-run) dry=1 ;;
        data | masks | train | attention | report) stages+=" $word" ;;
        cars196 | cub200 | sop | toy) datasets+=" $word" ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
        *[[:space:]]*) die "$word: spaces in the name; rename the folder" ;;
        *) [ -d "$word/images" ] || die "$word: unknown; give a stage, a dataset or a FOLDER (-h)"
            datasets+=" ${word%/}" ;;
    esac
done
: "${datasets:= cars196 cub200 sop}"
task=${SLURM_ARRAY_TASK_ID:-}
if [ "$task" ]; then : "${stages:= train attention}"; fi
[[ ! $task || $stages =~ ^(\ train|\ attention)+$ ]] ||
    die "--array:$stages; an array is only for train and attention, do the rest in other jobs"
count_gpus="import torch; print(*range(torch.cuda.device_count()))"
[ "$dry" ] || visible=$(python -c "$count_gpus" 2>/dev/null) ||
    die "python: torch is missing; activate the environment, or install requirements.txt"
export CUDA_DEVICE_ORDER=PCI_BUS_ID  # number GPUs as nvidia-smi does
GPUS=${GPUS:-${CUDA_VISIBLE_DEVICES-${visible-}}}
IFS=', ' read -ra gpus <<<"${GPUS:-none}"
exec 3<> <(:)  # a pipe that holds the free GPUs, each with the error of its last job
for stage in ${stages:-data masks train attention report}; do
    wanted=$datasets
    if [ "$stage" = report ]; then
        ${dry:+echo} python bgbias.py --report "$RUNS" || failed+="  report: exit code $?"$'\n'
        continue
    fi
    [[ $stage != data || ! $datasets =~ cars196|cub200|sop ]] || wanted+=" backgrounds weights u2net"
    [[ $stage != train || $dry$GPUS || $FLAGS == *--epochs* || $datasets == ' toy' ]] ||
        say "no GPU: a run with the paper's settings takes days"
    plan=$(for dataset in $wanted; do plan; done | sed -n "${task:+$((task + 1))}p")
    if [ "$task" ] && [ ! "$plan" ]; then die "--array: run $task does not exist; give fewer"; fi
    if [ ! "$plan" ]; then continue; fi
    if [ "$dry" ]; then cut -d ' ' -f 2- <<<"$plan"; continue; fi
    mkdir -p "$DATA" "$RUNS"
    printf '%s\n' "${gpus[@]}" >&3
    while read -ra job; do
        scorable=$(ls "$RUNS/${job[0]}"{,-*}/result.json 2>/dev/null) || true
        if [ "$stage" = attention ] && [ ! "$scorable" ]; then continue; fi
        next_gpu
        set -m  # gives the job its own process group, which stop() ends
        work "$gpu" "${job[@]}" &
        set +m
    done <<<"$plan"
    for gpu in "${gpus[@]}"; do next_gpu; done
done
[ ! "$failed" ] || { echo "failed; the same command tries again:"$'\n'"${failed%?}" >&2; exit 1; }
