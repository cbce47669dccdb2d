"""Data sets that no run can use: a table for `tests/integration/test_bad_inputs.py`, in its form."""

TRAINED = ["--train-data-path", "{replay}", "--forget-train-data-path", "{forget}"]
VALID = ["--valid-data-path", "{replay}", "--forget-valid-data-path", "{forget}"]
CASES: dict[str, tuple[list[str], list[str]]] = {
    "missing data": (["--data-path", "{dir}/no_such"], ["--data-path", "{dir}/no_such"]),
    "missing forget data": (
        ["--forget-data-path", "{dir}/no_such"],
        ["--forget-data-path", "{dir}/no_such"],
    ),
    "missing .idx": (["--data-path", "{dir}/no_idx"], ["{dir}/no_idx.idx"]),
    "missing .bin": (["--data-path", "{dir}/no_bin"], ["{dir}/no_bin.bin"]),
    "truncated .bin": (["--data-path", "{dir}/short_bin"], ["{dir}/short_bin.bin", "bytes"]),
    "truncated .idx": (["--forget-data-path", "{dir}/short_idx"], ["{dir}/short_idx.idx", "bytes"]),
    "empty data": (["--data-path", "{dir}/empty_text_document"], ["{dir}/empty_text_document"]),
    "negative blend weight": (
        ["--data-path", "-1", "{replay}", "1", "{forget}"],
        ["--data-path", "-1", "{replay}"],
    ),
    "blend weight of 0": (
        ["--forget-data-path", "1", "{replay}", "0", "{forget}"],
        ["--forget-data-path", "above 0", "0.0 for {forget}"],
    ),
    "blend weight without bounds": (
        ["--data-path", "1", "{replay}", "inf", "{forget}"],
        ["--data-path", "above 0", "inf for {forget}"],
    ),
    "weights for some of a blend": (
        ["--forget-data-path", "{forget}", "{replay}", "1", "{replay}"],
        ["--forget-data-path", "{forget} {replay} 1 {replay}"],
    ),
    "a data set to forget twice, by another name": (
        ["--forget-data-path", "{replay}", "{forget}", "{dir}/again"],
        ["--forget-data-path", "{dir}/again twice, also as {forget}"],
    ),
    "no validation share": (
        ["--split", "100,0,0", "--eval-iters", "2"],
        ["--split", "--data-path", "validation (--eval-iters 2)", "100,0,0", "--eval-iters 0"],
    ),
    "no training share": (["--split", "0,100,0"], ["--split", "training", "--skip-train"]),
    "split in words": (["--split", "most"], ["--split", "above 0", "most"]),
    "split in four": (["--split", "90,5,4,1"], ["--split", "three", "90,5,4,1"]),
    "share without a document": (
        ["--data-path", "{dir}/two"],
        ["--split", "--data-path {dir}/two", "valid split", "2", "90,10,0"],
    ),
    "share of forget data without a document": (
        ["--forget-data-path", "{dir}/two"],
        ["--split", "--forget-data-path {dir}/two", "valid split"],
    ),
    "forget data that end before the run": (
        ["--forget-data-path", "{forget}", "{replay}", "--allow-data-overlap"]
        + ["--train-iters", "400"],
        ["--forget-data-path", "4800", "train split", "without weights"],
    ),
    "plain data that end before the run": (
        ["--data-path", "{forget}", "{replay}", "--train-iters", "400"],
        ["--data-path", "6400", "train split", "without weights"],
    ),
    "unnamed": (["--forget-data-path", "{forget}"], ["--data-path", "found none"]),
    "unnamed, missing list": (
        ["--forget-data-path", "{forget}", "--data-args-path", "{dir}/no_such"],
        ["--data-args-path", "{dir}/no_such"],
    ),
    "unnamed, missing lists for each split": (
        ["--forget-data-path", "{forget}", "--per-split-data-args-path", "{dir}/no_such"],
        ["--per-split-data-args-path", "{dir}/no_such"],
    ),
    "unnamed, lists for some splits": (
        ["--forget-data-path", "{forget}", "--per-split-data-args-path", "{dir}/lists.json"],
        ["--per-split-data-args-path", "'valid'"],
    ),
    "unnamed, data twice": (
        ["--forget-data-path", "{forget}", "--train-data-path", "{replay}"]
        + ["--data-args-path", "{dir}/list"],
        ["--data-args-path", "--train-data-path"],
    ),
    "unnamed, list with weights for some": (
        ["--forget-data-path", "{forget}", "--data-args-path", "{dir}/bad_list"],
        ["--data-args-path"],
    ),
    "unnamed, weights for some of a split": (
        [*TRAINED, "--forget-valid-data-path", "{forget}", "{replay}", "1", "{replay}"],
        ["--forget-valid-data-path", "{forget} {replay} 1 {replay}"],
    ),
    "unnamed, no training path": (
        [*VALID, "--forget-train-data-path", "{forget}"],
        ["--train-data-path", "training", "--skip-train"],
    ),
    "unnamed, no forget training path": (
        [*VALID, "--train-data-path", "{replay}"],
        ["--forget-train-data-path", "training", "--skip-train"],
    ),
    "unnamed, no validation path": (
        [*TRAINED, "--forget-valid-data-path", "{forget}", "--eval-iters", "2"],
        ["--valid-data-path", "validation (--eval-iters 2)", "--eval-iters 0"],
    ),
    "unnamed, no forget validation path": (
        [*TRAINED, "--valid-data-path", "{replay}", "--eval-iters", "2"],
        ["--forget-valid-data-path", "validation", "--eval-iters 0"],
    ),
    "unnamed, missing forget validation data": (
        [*TRAINED, "--forget-valid-data-path", "{dir}/no_such", "--valid-data-path", "{replay}"],
        ["--forget-valid-data-path", "{dir}/no_such"],
    ),
    "unnamed, test path for replay alone": (
        [*TRAINED, *VALID, "--test-data-path", "{replay}", "--eval-iters", "2"],
        ["--test-data-path", "--forget-test-data-path too"],
    ),
    "unnamed, test path for forget alone": (
        [*TRAINED, *VALID, "--forget-test-data-path", "{forget}", "--eval-iters", "2"],
        ["--forget-test-data-path", "--test-data-path too"],
    ),
}
