"""The DeepSpeed engine's state as one file: whole, exact, and good for another number of workers."""

import os

import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as mp

from pipelines.config import Train

STEPS, SAVED_AT = 5, 3


def _objective():
    from deltamem import DeltaMemConfig, get_delta_mem_model
    from pipelines.training.objective import MemoryObjective
    from tests.tiny_models import make_tiny_model

    torch.manual_seed(3)
    model = get_delta_mem_model(make_tiny_model("qwen3"), DeltaMemConfig(output_init="random", online_gain=0.5))
    return MemoryObjective(model, 0.01, 0.05)


def _rows():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        ids = torch.randint(3, 100, (20,), generator=generator).tolist()
        rows.append({
            "paper_id": f"p{i}", "question_id": f"q{i}", "answer_type": "", "references": [], "messages": [],
            "context_ids": ids[: 8 + i % 3], "segment_ids": [0] * (8 + i % 3), "question": "", "answer": "",
            "question_ids": ids[11:15], "answer_ids": ids[15 : 17 + i % 2],
        })  # fmt: skip
    return rows


def _worker(rank, workers, port, folder, start_from):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from pipelines.data.shards import SCHEMA
    from pipelines.training import checkpoint
    from pipelines.training import deepspeed_engine as engines
    from pipelines.training.batches import collate
    from pipelines.training.learning_rate import learning_rate
    from pipelines.training.schedule import Schedule

    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    train = Train(batch_size=4, num_workers=workers, learning_rate=1e-2, precision="float32", epochs=9)
    table = pa.Table.from_pylist(_rows(), schema=SCHEMA)
    schedule = Schedule(table, train, 0, workers)
    engine = engines.make_engine(_objective(), train, torch.device("cpu"))
    first = 0
    if start_from:
        saved, record = checkpoint.load(folder / start_from)
        first = record["step"]
        engines.set_state(engine, saved, first)
    for step in range(first, STEPS):
        engines.set_learning_rate(engine, learning_rate(train, step, STEPS))
        micro_batches = schedule.micro_batches(step, rank)
        batches = [collate(table, groups, 0) for groups, _, _ in micro_batches]
        shares = [weight / len(batches) for _, weight, _ in micro_batches]
        assert len(list(engines.learn(engine, batches, shares))) == len(batches) == schedule.accumulation
        if step + 1 in (SAVED_AT, STEPS):
            tensors = engines.gather_state(engine)
            if rank == 0:
                out = folder / f"{start_from or 'straight'}-{workers}-step{step + 1}"
                out.mkdir()
                checkpoint.save(out, tensors, step + 1, {})
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two workers straight through; then from step 3 again with two workers, and with one."""
    folder, saved = tmp_path_factory.mktemp("engine"), f"straight-2-step{SAVED_AT}"
    for number, (workers, start_from) in enumerate([(2, None), (2, saved), (1, saved)]):
        port = 20000 + os.getpid() % 20000 + number
        # forked, because importing everything again would take most of the time
        mp.start_processes(_worker, (workers, port, folder, start_from), nprocs=workers, start_method="fork")
    return folder


def state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "trainer_state.safetensors")


def test_a_restored_run_ends_in_the_same_bits(runs):
    straight = state(runs / f"straight-2-step{STEPS}")
    resumed = state(runs / f"straight-2-step{SAVED_AT}-2-step{STEPS}")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    moved = state(runs / f"straight-2-step{SAVED_AT}")
    assert any(not torch.equal(straight[name], moved[name]) for name in straight if name.startswith("master."))


def test_a_run_goes_on_with_another_number_of_workers(runs):
    two = state(runs / f"straight-2-step{STEPS}")
    one = state(runs / f"straight-2-step{SAVED_AT}-1-step{STEPS}")
    for name in two:
        if name.startswith("master."):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_the_checkpoint_holds_the_adapter_and_nothing_of_the_backbone(runs):
    names = state(runs / f"straight-2-step{STEPS}")
    owners = {name.split(".")[1] for name in names if "." in name}
    assert owners == {"adapter"} and {name.split(".")[0] for name in names} == {
        "master", "exp_avg", "exp_avg_sq", "random_state"
    }  # fmt: skip
