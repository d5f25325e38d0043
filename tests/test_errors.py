"""How a program ends: its exit code and its one sentence, whatever becomes of its output."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PROGRAM = """
import os, sys
from utils.errors import ProcessLost, StopRequested, UserError, exit_with_sentence
def main():
    {body}
exit_with_sentence(main)
"""
ENDS = {
    "print('done')": 0,
    "raise UserError('--lr')": 2,
    "raise ProcessLost(3.0)": 3,
    "raise KeyboardInterrupt": 130,
    "raise StopRequested(15)": 143,
    "raise ZeroDivisionError": 1,
}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(body, shell="{python}", **environment):
    """Run a program through a shell command; its exit code goes to the last line of stderr."""
    command = f"{{ {shell}; echo $? >&9; }} 9>&2".replace("{python}", '"$0" -c "$1"')
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM.format(body=body)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    *error, code = done.stderr.decode("utf-8", "surrogateescape").splitlines()
    return int(code), done.stdout, "\n".join(error)


@pytest.mark.parametrize(("end", "code"), ENDS.items())
@pytest.mark.parametrize("streams", ["", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&-"])
def test_the_exit_code_is_the_same_with_closed_output(streams, end, code):
    found, _, error = run(f"print('line'); {end}", "{python} " + streams)
    assert found == code
    assert "2>&-" in streams or (error == "") == (code == 0)


@pytest.mark.parametrize(("end", "code"), ENDS.items())
def test_the_exit_code_is_the_same_when_the_reader_goes_away(end, code):
    body = f"[print(number, flush=number % 99 == 0) for number in range(50_000)]; sys.stderr.write('through\\n'); {end}"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, PROGRAM.format(body=body)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "0\n") and done.stderr.startswith("through\n")
    assert "BrokenPipe" not in done.stderr and ("Traceback" in done.stderr) == (code == 1)


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    body = f"file = open({str(tmp_path / 'last.pt')!r}, 'w'); os.write(1, b'x'); os.write(2, b'x'); file.write('whole')"
    assert run(body, "{python} >&- 2>&-")[0] == 0
    assert (tmp_path / "last.pt").read_text() == "whole"


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "utf-8"}])
def test_any_name_can_be_printed(environment):
    code, out, error = run(
        "print('caf\\xe9 \\u6f22 \\udce9'); raise UserError('caf\\xe9 \\u6f22 \\udce9')", **environment
    )
    assert code == 2 and b"caf" in out and "error: caf" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("open('x' * 300)", "File name too long"),
        ("open('/dev/null/x')", "Not a directory"),
        ("os.write(os.open('/dev/full', os.O_WRONLY), b'x')", "No space left on device; make room"),
        ("raise MemoryError", "not enough memory; use a smaller --batch-size"),
        ("import torch; torch.empty(10**17)", "not enough memory; use a smaller --batch-size"),
        ("import torch; torch.zeros(10**14)", "not enough memory; use a smaller --batch-size"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(body, message):
    code, _, error = run(body)
    assert code == 2 and message in error and error.count("\n") == 0, error
