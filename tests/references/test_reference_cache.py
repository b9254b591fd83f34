"""What is written is read again; what was changed on disk is noticed, said once, and not used."""

import logging
import shutil

import numpy as np
import pytest

from fastdpo.references import cache as cache_module
from fastdpo.references.cache import LogpsCache, default_cache_dir, sequence_key

FACTS = {"model": "LlamaForCausalLM", "weights": "abc"}
KEYS = [bytes([i]) * 16 for i in range(5)]
LOGPS = [-0.5, -1.5, -2.25, -3.0, -4.125]  # exact in fp32


@pytest.fixture
def cache(tmp_path):
    return LogpsCache(tmp_path / "cache", FACTS)


@pytest.fixture
def warnings(caplog):
    """Texts of the warnings so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_shards_are_read_together(cache, warnings):
    cache.write(KEYS[:3], LOGPS[:3])
    cache.write(KEYS[3:], LOGPS[3:])
    assert cache.read() == dict(zip(KEYS, LOGPS, strict=True))
    assert not warnings()


def test_a_shard_that_cannot_be_written_whole_is_not_there(cache, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="no space left"):
        cache.write(KEYS, LOGPS)
    assert [path.name for path in cache.folder.iterdir()] == ["about.json"]


def test_another_reference_reads_nothing_of_it(cache, tmp_path):
    cache.write(KEYS, LOGPS)
    assert LogpsCache(tmp_path / "cache", {**FACTS, "weights": "abd"}).read() == {}
    assert LogpsCache(tmp_path / "cache", FACTS).read() != {}


def truncated(content):
    return content[:-3]


def cut_in_the_header(content):
    return content[:20]


def emptied(content):
    return b""


def with_another_number(content):
    return content.replace(np.float32(-2.25).tobytes(), np.float32(-2.0).tobytes())


def with_another_header(content):
    return content.replace(b'"keys"', b'"kexs"')


@pytest.mark.parametrize(
    "damage",
    [truncated, cut_in_the_header, emptied, with_another_number, with_another_header],
    ids=lambda f: f.__name__,
)
def test_a_damaged_shard_counts_for_nothing_and_is_named_once(cache, warnings, damage):
    good = cache.write(KEYS[:2], LOGPS[:2])
    bad = cache.write(KEYS[2:], LOGPS[2:])
    content = bad.read_bytes()
    assert damage(content) != content
    bad.write_bytes(damage(content))
    assert cache.read() == dict(zip(KEYS[:2], LOGPS[:2], strict=True))
    assert len(warnings()) == 1
    assert str(bad) in warnings()[0]
    assert str(good) not in warnings()[0]
    cache.read()
    assert len(warnings()) == 1


def test_several_damaged_shards_are_one_warning(cache, warnings):
    for start in (0, 2):
        path = cache.write(KEYS[start : start + 2], LOGPS[start : start + 2])
        path.write_bytes(path.read_bytes()[:-1])
    assert cache.read() == {}
    assert len(warnings()) == 1


def test_a_shard_of_another_reference_is_not_read(cache, tmp_path, warnings):
    other = LogpsCache(tmp_path / "cache", {"model": "another"})
    path = other.write(KEYS, LOGPS)
    shutil.copy(path, cache.folder / path.name)
    assert cache.read() == {}
    assert len(warnings()) == 1


def test_a_process_that_does_not_mend_leaves_damaged_files_and_says_nothing(cache, warnings):
    path = cache.write(KEYS, LOGPS)
    path.write_bytes(b"x")
    assert cache.read(mend=False) == {}
    assert path.exists()
    assert not warnings()


def shards_of(cache):
    return sorted(cache.folder.glob("*.safetensors"))


def write_one_by_one(cache, num_shards):
    expected = {bytes([i]) * 16: -float(i) for i in range(num_shards)}
    for sequence, logp in expected.items():
        cache.write([sequence], [logp])
    return expected


def test_many_shards_are_put_together_and_few_are_not(cache, warnings, monkeypatch):
    monkeypatch.setattr(cache_module, "_MOST_SHARDS", 4)
    expected = write_one_by_one(cache, 4)
    assert cache.read() == expected
    assert len(shards_of(cache)) == 4
    expected = write_one_by_one(cache, 6)
    assert cache.read(mend=False) == expected
    assert len(shards_of(cache)) == 6
    assert cache.read() == expected
    assert len(shards_of(cache)) == 1
    assert cache.read() == expected
    assert not warnings()


def test_shards_that_are_put_together_while_they_are_read_are_not_missed(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_MOST_SHARDS", 2)
    expected = write_one_by_one(cache, 5)
    reader, read_shard = LogpsCache(cache.folder.parent, FACTS), LogpsCache._read_shard

    def after_another_process(self, path):
        monkeypatch.setattr(LogpsCache, "_read_shard", read_shard)
        cache.read()
        return read_shard(self, path)

    monkeypatch.setattr(LogpsCache, "_read_shard", after_another_process)
    assert reader.read(mend=False) == expected
    assert len(shards_of(cache)) == 1


def test_a_folder_that_is_only_to_be_read_is_read(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_MOST_SHARDS", 2)
    expected = write_one_by_one(cache, 5)
    damaged = cache.write([b"x" * 16], [-1.0])
    damaged.write_bytes(b"x")

    def refuses(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(cache_module, "write_whole", refuses)
    monkeypatch.setattr(cache_module.Path, "unlink", refuses)
    assert LogpsCache(cache.folder.parent, FACTS).read() == expected


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"ref_cache_dir must .*got"):
        LogpsCache(tmp_path / "file", FACTS)


def test_the_default_folder_follows_the_users_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(default_cache_dir()) == "/somewhere/fastdpo/ref_logps"


def test_a_sequence_is_known_by_its_tokens_and_by_what_counts():
    tokens, counted = np.array([1, 2, 3, 4]), np.array([False, False, True, True])
    expected = sequence_key(tokens, counted)
    assert sequence_key(tokens.astype(np.int32), counted) == expected
    others = [
        sequence_key(np.array([1, 2, 3, 5]), counted),
        sequence_key(tokens, np.array([False, True, True, True])),
        sequence_key(tokens[:3], counted[:3]),
        sequence_key(np.array([1, 2, 3, 4, 0]), np.array([False, False, True, True, False])),
    ]
    assert len({expected, *others}) == 5
