"""The reference pipeline's arguments as settings."""

import pytest

from wan_core.cache_settings import MagCacheSettings, TeaCacheSettings
from wan_core.call_arguments import cache_of_call, windows_of_call
from wan_core.settings import WindowSettings

SMALL = "Wan2.1-T2V-1.3B"


def test_arguments_become_settings():
    assert cache_of_call(None, "") is None
    assert cache_of_call(None, SMALL) is None
    assert cache_of_call(None, "", MagCacheSettings()) == MagCacheSettings()
    assert cache_of_call(0.05, "") == TeaCacheSettings(threshold=0.05)
    assert cache_of_call(0.05, SMALL) == TeaCacheSettings(threshold=0.05, template=SMALL)
    assert windows_of_call(None, None) is None
    assert windows_of_call(9, 5) == WindowSettings(size=9, stride=5)


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (windows_of_call, (9, None), "belong together; got 9 and None"),
        (windows_of_call, (4, 9), "from 1 to 4"),
        (cache_of_call, (0.1, "", MagCacheSettings()), "one step cache"),
        (cache_of_call, (None, "", "magcache"), "such as MagCacheSettings"),
        (cache_of_call, (0.1, "Wan2.2"), "tea_cache_model_id must be one of"),
        (cache_of_call, (-0.1, SMALL), "tea_cache_l1_thresh must be from 0 up"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(function, arguments, words):
    with pytest.raises(ValueError, match=words):
        function(*arguments)
