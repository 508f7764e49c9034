"""What the tiny models give is what they gave before, to the last bit where this machine is known."""

import pytest
import torch

from tests import digests


@pytest.mark.parametrize("group", digests.GROUPS)
def test_the_outputs_are_those_of_before(group):
    assert not digests.differences(digests.computed(group), digests.load(), group)


def test_a_change_is_named_and_stored(tmp_path, monkeypatch):
    """One unit in the last place of one output, a tenth of another, one that is gone; and what `write` then keeps."""
    file, x = tmp_path / "digests.json", torch.rand(3, 5, generator=torch.manual_seed(0)) + 1
    outputs = {"same": x, "bits": x, "numbers": x, "gone": x}

    def found(**changes):
        monkeypatch.setitem(digests.GROUPS, "group", lambda: iter({**outputs, **changes}.items()))
        return digests.computed("group")

    here = digests.environment()
    digests.write(found(), file)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(digests, "environment", lambda: "another machine")
        digests.write(found(), file)
        assert digests.load(file)["digests"].keys() == {here, "another machine"}
    assert not digests.differences(found(), digests.load(file), "group")
    nearly = x.clone()
    nearly[1, 1] = torch.nextafter(x[1, 1], torch.tensor(9.0))
    del outputs["gone"]
    changed = found(bits=nearly, numbers=x * 1.1)
    wrong = digests.differences(changed, digests.load(file), "group")
    assert [line.partition(",")[0] for line in wrong] == [
        "group: bits: other last bits", "group: gone: not computed any more", "group: numbers: other numbers",
    ]  # fmt: skip
    digests.write(changed, file)
    assert not digests.differences(changed, digests.load(file), "group")
    assert digests.load(file)["digests"]["another machine"].keys() == {"group: same"}
