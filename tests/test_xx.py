import time
from tests.test_run import threads
def test_x(tmp_path):
    with threads("--sweep", "5s") as program:
        program.make("stalled")
        program.tell("wait", "stalled")
        t=time.monotonic()
        while time.monotonic() < t+14:
            program.hear(0.5)
            print(round(time.monotonic()-t,1), program.options("stalled"), program.ended)
        assert 0
