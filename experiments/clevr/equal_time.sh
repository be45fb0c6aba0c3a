# Trainings of CLEVR at equal processor time, for comparison.sh and recipes/search.sh. They set
# RUNS, RECORDS and reference, the flags of the training whose steps are the unit of time.
shopt -s inherit_errexit  # A measurement that fails is no number.
MSDSPN=${MSDSPN:-msdspn}
PYTHON=${PYTHON:-python}

seconds() { # steps, flags: processor seconds of a training step
  rm -rf "$RUNS/pace.$$"
  $PYTHON experiments/clevr/pace.py $MSDSPN train clevr "${@:2}" --steps "$1" \
    --evaluate-every 1000 --run-dir "$RUNS/pace.$$"
  rm -rf "$RUNS/pace.$$"
}

pace() { # file, steps, flags: puts into the file what a step costs, in steps of the reference
  if [[ -e $1 ]]; then return; fi
  mkdir -p "$RUNS"
  local before own after
  before=$(seconds 60 "${reference[@]}")
  own=$(seconds "$2" "${@:3}")
  after=$(seconds 60 "${reference[@]}")
  $PYTHON -c "print(2 * $own / ($before + $after))" > "$1.new"
  mv "$1.new" "$1"
}

train() { # name, steps, flags: trains, scores and keeps the record; goes on where it was stopped
  if [[ -e $RECORDS/$1/metrics.jsonl ]]; then return; fi
  $MSDSPN train clevr "${@:3}" --steps "$2" --resume auto --run-dir "$RUNS/$1"
  $MSDSPN evaluate "$RUNS/$1"
  $PYTHON experiments/keep_run.py "$RUNS/$1" "$RECORDS"
}
