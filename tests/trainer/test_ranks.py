import pytest

from tests.programs import PATIENCE
from tests.reference import relative_error
from tests.trainer.runs import config, events, free_port, losses, program, run, weights


def launcher(processes):
    """What `accelerate launch` starts on several GPUs; on CPUs alone it would want MPI."""
    return (
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "trainer.train",
    )  # fmt: skip


def finish(process):
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    return text


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_epochs=2),
        dict(trainable_models=("dit",), gradient_accumulation_steps=3, dataset_repeat=5),
        dict(variant="i2v_pair", gradient_accumulation_steps=2, dataset_repeat=4),
    ],
    ids=["lora", "full, accumulated", "both experts"],
)
def test_two_processes_train_as_one_with_the_same_global_batch(shared, tmp_path, changes):
    one, two = tmp_path / "one", tmp_path / "two"
    more = dict(learning_rate=1e-3, **changes)
    run(config(shared, one, batch_size=2, **more))
    finish(program(config(shared, two, batch_size=1, **more), *launcher(2)))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, found = weights(one)[0], weights(two)[0]
    assert expected.keys() == found.keys()
    assert all(relative_error(found[name], tensor) < 1e-2 for name, tensor in expected.items())
    drawn = [[sorted(zip(e["timesteps"], e["errors"], strict=True)) for e in events(out)] for out in (one, two)]
    for first, second in zip(*drawn, strict=True):
        for (t, error), (u, other) in zip(first, second, strict=True):
            assert t == u and other == pytest.approx(error, rel=1e-3)


def test_two_processes_stop_and_continue(shared, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = dict(learning_rate=1e-3, validation_clips=1, validate_steps=2, dataset_repeat=4, sample_steps=2)
    more["sample_inference_steps"] = 1
    finish(program(config(shared, whole, **more), *launcher(2)))
    finish(program(config(shared, parts, max_steps=1, **more), *launcher(2)))
    text = finish(program(config(shared, parts, **more), *launcher(2)))
    assert text.count("Continuing from") == 1
    assert losses(whole) == losses(parts)
    expected, found = weights(whole)[0], weights(parts)[0]
    assert expected.keys() == found.keys() and all(t.equal(found[name]) for name, t in expected.items())
    assert len(events(whole, "start")) == 1 and len(events(whole, "validation")) == 1


def on_machine(rank, port, settings):
    """One of two machines with one process each, started as the configuration of `trainer/accelerate` says."""
    words = ("--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2")
    words += ("--main_process_ip", "localhost", "--main_process_port", port, "--mixed_precision", "no")
    return program(
        settings, "-m", "accelerate.commands.launch", "--config_file", "trainer/accelerate/ddp.yaml", *words,
        "-m", "trainer.train",
    )  # fmt: skip


def test_two_machines_train_as_one_process(shared, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(config(shared, one, batch_size=2, learning_rate=1e-3))
    port = free_port()
    machines = [on_machine(rank, port, config(shared, two, learning_rate=1e-3)) for rank in range(2)]
    for machine in machines:
        finish(machine)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_machines_without_a_common_folder_are_told_so(shared, tmp_path):
    places = [tmp_path / "first", tmp_path / "second"]
    finish(program(config(shared, places[0], max_steps=1), *launcher(2)))
    port = free_port()
    machines = [on_machine(rank, port, config(shared, place)) for rank, place in enumerate(places)]
    for machine in machines:
        text = machine.communicate(timeout=PATIENCE)[0]
        assert machine.returncode != 0 and "a folder that all machines share" in text


def test_a_run_of_one_process_is_not_continued_by_two(shared, tmp_path):
    run(config(shared, tmp_path, max_steps=1))
    process = program(config(shared, tmp_path), *launcher(2))
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode != 0 and "processes was 1 and is 2" in text
