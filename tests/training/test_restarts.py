"""A rank that is killed under torchrun: the next attempt goes on. dev/restarts.py tries it more often and counts."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.fault("P3")
def test_each_attempt_meets_in_its_own_part_of_the_store(tmp_path):
    """torchrun's store with the address that a killed rank 0 left there: a second attempt must not find it."""
    code = textwrap.dedent("""
        import os, sys, torch.distributed as dist
        from datetime import timedelta
        from nanolab import runtime
        agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True")
        os.environ |= dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
        met = []
        dist.init_process_group = lambda *args, store=None, **more: met.append(store or agent)
        runtime.Runtime.broadcast_object = lambda self, value: value
        for attempt in "012":
            os.environ["TORCHELASTIC_RESTART_COUNT"] = attempt
            runtime.start("cpu", "float32")
            met[-1].set("rank 0", attempt)
        print([store.get("rank 0").decode() for store in met])
    """)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "['0', '1', '2']", done.stderr


@pytest.mark.slow
def test_a_killed_rank_comes_back_and_the_run_ends(monkeypatch):
    monkeypatch.setenv("PYTHON_EXEC", str(warm.executable()))  # of torchrun, for its ranks
    spec = importlib.util.spec_from_file_location("nanolab_dev_restarts", ROOT / "dev" / "restarts.py")
    restarts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(restarts)
    for _ in range(2):  # on the code before, too, most tries ended well
        found = restarts.product(150)
        assert found["passed"], json.dumps(found, indent=1)
