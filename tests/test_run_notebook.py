"""What is kept of the streams of an executed notebook."""

import importlib.util

import nbformat

from saelib.paths import ROOT

SPEC = importlib.util.spec_from_file_location("run_notebook", ROOT / "workflow/run_notebook.py")
run_notebook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_notebook)


def stream(text, name="stderr"):
    output = nbformat.v4.new_output("stream", name=name, text=text)
    kept = run_notebook.last_state(output)
    return kept and kept.text


def test_of_a_bar_that_ended_the_last_state_is_kept():
    assert stream("\rfetch:   0%|          | 0/2\rfetch: 100%|####| 2/2\n") == "fetch: 100%|####| 2/2"


def test_bars_below_one_another_leave_nothing():
    inner = "\rinner:  50%|#  | 1/2\x1b[A\n\n\rinner: 100%|##| 2/2\x1b[A\n"
    assert stream(f"\router:   0%|   | 0/4\n{inner}\router:  25%|#  | 1/4") is None


def test_warnings_and_printed_text_stay_as_they_are():
    assert stream("UserWarning: 50% of it\n") == "UserWarning: 50% of it"
    assert stream("a\n\n 5%|b\n", name="stdout") == "a\n\n 5%|b\n"
