"""The compiled LMDB reader against py-lmdb's own reading, and against damaged files."""

import ctypes
import mmap
import os
import random
import struct
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import _C
from rcmstr_fast.data import lmdb_read

ABSENT = [b"", b"image-", b"image-000000000", b"zzz", b"\x00", b"\xff" * 300]


def make(folder: Path, entries: dict[bytes, bytes], deleted=()) -> str:
    with lmdb.open(str(folder), map_size=1 << 28) as env:
        with env.begin(write=True) as txn:
            for key, value in entries.items():
                txn.put(key, value)
        if deleted:
            with env.begin(write=True) as txn:
                for key in deleted:
                    txn.delete(key)
    return str(folder / "data.mdb")


def same_as_lmdb(path: str, keys: list[bytes]) -> None:
    with (
        lmdb.open(path, subdir=False, readonly=True, lock=False) as env,
        env.begin() as txn,
    ):
        expected = [txn.get(key) if key else None for key in keys]
        entries = env.stat()["entries"]
    reader = _C.LmdbReader(path)
    assert reader.get(keys) == expected
    assert reader.entries == entries


@pytest.mark.parametrize("count", [0, 1, 2, 5, 60, 700])
def test_small_databases(tmp_path, count):
    rng = random.Random(count)
    entries = {b"image-%09d" % i: rng.randbytes(rng.randint(0, 300)) for i in range(1, count + 1)}
    same_as_lmdb(make(tmp_path, entries), [*entries, *ABSENT])


def test_many_records_with_values_of_many_pages_and_deletions(tmp_path):
    rng = random.Random(0)
    entries = {
        b"image-%09d" % i: rng.randbytes(rng.choice((10, 500, 2000, 2100, 4080, 4081, 9000))) for i in range(1, 20001)
    }
    entries |= {b"label-%09d" % i: b"word%d" % i for i in range(1, 20001)}
    deleted = [b"image-%09d" % i for i in range(1, 20001) if i % 7 == 0 or 5000 < i < 9000]
    path = make(tmp_path, entries, deleted)
    keys = list(entries)
    rng.shuffle(keys)
    same_as_lmdb(path, keys + ABSENT)
    numbers = [20000, 1, 7, 3, 3, 20001, 0, -1, 10**9, 10**15]
    reader = _C.LmdbReader(path)
    assert reader.records("image", numbers) == reader.get([b"image-%09d" % n for n in numbers])
    assert reader.records("label", [2, 20000]) == [b"word2", b"word20000"]


@settings(max_examples=30, deadline=None)
@given(
    entries=st.dictionaries(st.binary(min_size=1, max_size=500), st.binary(max_size=9000), max_size=40),
    asked=st.lists(st.binary(min_size=1, max_size=500), max_size=10),
)
def test_any_keys_and_values(tmp_path_factory, entries, asked):
    path = make(tmp_path_factory.mktemp("lmdb"), entries)
    same_as_lmdb(path, [*entries, *asked])


def resident(path: str) -> int:
    """Pages of a file that are in memory."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages) == 0
        return sum(page & 1 for page in pages)


def test_prefetching_brings_values_into_memory(tmp_path):
    path = make(tmp_path, {b"image-%09d" % i: b"x" * (40_000 if i % 2 else 1500) for i in range(1, 101)})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = _C.LmdbReader(path)
    before = resident(path)
    if before > 50:
        pytest.skip("this file system keeps its files in memory")
    reader.prefetch("image", np.arange(1, 101))
    ends = time.monotonic() + 20
    while (now := resident(path)) < 50 * 10 + 20 and time.monotonic() < ends:
        time.sleep(0.01)
    assert now >= 50 * 10 + 20


def by_hand(path: Path, page_size: int, entries: dict[bytes, bytes]) -> str:
    """A one-leaf database of any page size, as a machine with other memory pages writes it."""
    keys = sorted(entries)
    lower, upper, offsets, nodes = 16 + 2 * len(keys), page_size, [], b""
    for key in keys:
        value = entries[key]
        node = struct.pack("<HHHH", len(value) & 0xFFFF, len(value) >> 16, 0, len(key)) + key + value
        node += b"\0" * (len(node) % 2)
        upper -= len(node)
        offsets.append(upper)
        nodes = node + nodes
    leaf = struct.pack("<QHHHH", 2, 0, 2, lower, upper) + struct.pack(f"<{len(keys)}H", *offsets)
    leaf += b"\0" * (page_size - len(leaf) - len(nodes)) + nodes
    pages = b""
    for number in range(2):
        free = struct.pack("<IHHQQQQQ", page_size, 8, 0, 0, 0, 0, 0, 2**64 - 1)
        main = struct.pack("<IHHQQQQQ", 0, 0, 1, 0, 1, 0, len(keys), 2)
        meta = struct.pack("<IIQQ", 0xBEEFC0DE, 1, 0, 1 << 20) + free + main + struct.pack("<QQ", 2, number)
        pages += (struct.pack("<QHHI", number, 0, 8, 0) + meta).ljust(page_size, b"\0")
    path.write_bytes(pages + leaf)
    return str(path)


@pytest.mark.parametrize("page_size", [512, 1024, 8192, 16384, 32768])
def test_other_page_sizes(tmp_path, page_size):
    entries = {b"image-%09d" % i: bytes([i]) * 20 for i in range(1, 9)}
    path = by_hand(tmp_path / "data.mdb", page_size, entries)
    assert _C.LmdbReader(path).get([*entries, *ABSENT]) == [*entries.values(), *[None] * len(ABSENT)]
    if page_size >= 4096:
        same_as_lmdb(path, [*entries, *ABSENT])


def test_newest_meta_wins_and_one_damaged_meta_is_survived(tmp_path):
    path = Path(make(tmp_path, {b"a": b"1"}))
    make(tmp_path, {b"a": b"2"})
    assert _C.LmdbReader(str(path)).get([b"a"]) == [b"2"]
    sound = path.read_bytes()
    transactions = [struct.unpack_from("<Q", sound, page * 4096 + 16 + 128)[0] for page in range(2)]
    for page in range(2):
        path.write_bytes(sound[: page * 4096 + 16] + b"\0\0\0\0" + sound[page * 4096 + 20 :])
        expected = b"1" if transactions[page] == max(transactions) else b"2"
        assert _C.LmdbReader(str(path)).get([b"a"]) == [expected]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\0" * 100_000, b"\xff" * 100_000])
def test_no_lmdb(tmp_path, content):
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(_C.LmdbError, match="not an LMDB data file"):
        _C.LmdbReader(str(tmp_path / "data.mdb"))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(_C.LmdbError, match="cannot be opened"):
        _C.LmdbReader(str(tmp_path / "none"))
    with pytest.raises(_C.LmdbError, match="not a file"):
        _C.LmdbReader(str(tmp_path))


def test_other_versions_and_flags_are_left_to_liblmdb(tmp_path):
    path = Path(by_hand(tmp_path / "data.mdb", 4096, {b"a": b"1"}))
    sound = path.read_bytes()
    for offset, value in ((16 + 4, 2), (16 + 76, 4)):
        changed = bytearray(sound)
        changed[offset] = changed[4096 + offset] = value
        path.write_bytes(changed)
        with pytest.raises(_C.LmdbUnsupported):
            _C.LmdbReader(str(path))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[bytes, list[bytes], list[bytes | None]]:
    rng = random.Random(1)
    entries = {b"image-%09d" % i: rng.randbytes(rng.choice((30, 1500, 6000))) for i in range(1, 301)}
    path = make(tmp_path_factory.mktemp("sound"), entries)
    return Path(path).read_bytes(), list(entries), list(entries.values())


def read_all(path: Path, keys: list[bytes]) -> list[bytes | None] | None:
    try:
        reader = _C.LmdbReader(str(path))
    except _C.LmdbError:
        return None
    assert reader.prefetch("image", range(len(keys) + 2)) is None
    return reader.get(keys)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_crash(tmp_path_factory, sound, data):
    content, keys, _ = sound
    changed = bytearray(content)
    header = st.builds(
        lambda page, inside: page * 4096 + inside, st.integers(0, len(content) // 4096 - 1), st.integers(0, 160)
    )
    for _ in range(data.draw(st.integers(1, 8))):
        offset = data.draw(header | st.integers(0, len(content) - 1))
        changed[offset] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.mdb"
    path.write_bytes(changed)
    values = read_all(path, keys)
    assert values is None or all(value is None or len(value) <= len(content) for value in values)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_truncated_files_lose_records_only(tmp_path_factory, sound, share):
    content, keys, expected = sound
    path = tmp_path_factory.getbasetemp() / "short.mdb"
    path.write_bytes(content[: int(share * len(content))])
    values = read_all(path, keys)
    assert values is None or all(got in (None, want) for got, want in zip(values, expected))


def left_in(content: bytes) -> set[bytes]:
    """Keys of all leaf pages of a cut file whose value lies in the file."""
    found = set()
    for number in range(2, len(content) // 4096):
        page = content[number * 4096 : (number + 1) * 4096]
        own, flags, lower = struct.unpack_from("<QxxHH", page)
        if own != number or flags & 0x4F != 2:
            continue
        for at in struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16):
            size, big, key_size = struct.unpack_from("<IHH", page, at)
            start = struct.unpack_from("<Q", page, at + 8 + key_size)[0] * 4096 + 16 if big else 0
            if start + size <= len(content):
                found.add(page[at + 8 : at + 8 + key_size])
    return found


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_file_keeps_every_record_whose_pages_are_there(tmp_path, share):
    rng = random.Random(2)
    entries = {b"image-%09d" % i: rng.randbytes(rng.choice((30, 900, 6000))) for i in range(1, 1501)}
    path = Path(make(tmp_path, entries))
    content, keys, values = path.read_bytes(), list(entries), list(entries.values())
    end = int(share * len(content)) // 4096 * 4096 + 100
    path.write_bytes(content[:end])
    reader = _C.LmdbReader(str(path))
    assert reader.lost_pages == len(content) // 4096 - end // 4096
    assert reader.entries == len(entries)
    reader.prefetch("image", np.arange(1, 1501))
    found = {key for key, got, want in zip(keys, reader.get(keys), values, strict=True) if got == want}
    assert {key for key, got in zip(keys, reader.get(keys), strict=True) if got is not None} == found
    assert found == left_in(content[:end]) & set(keys)
    assert 0.8 * share < len(found) / len(entries) < 1.2 * share
    assert reader.largest_number("image") >= max(int(key[6:]) for key in found) and reader.largest_number("x") == 0


def test_a_sound_file_is_not_searched(tmp_path):
    entries = {b"image-%09d" % i: b"x" * 500 for i in range(1, 300)}
    reader = _C.LmdbReader(make(tmp_path, entries, deleted=[b"image-000000007"]))
    assert reader.records("image", [7, 8]) == [None, b"x" * 500] and reader.get(ABSENT) == [None] * len(ABSENT)
    assert not reader.damaged and reader.lost_pages == 0 and reader.largest_number("image") == 0


def test_a_file_without_its_last_free_page_is_not_searched(tmp_path):
    """LMDB does not write a page that a transaction took and gave back."""
    path = Path(make(tmp_path, {b"image-%09d" % i: b"x" * 500 for i in range(1, 300)}))
    content = bytearray(path.read_bytes())
    for page in range(2):
        (last,) = struct.unpack_from("<Q", content, page * 4096 + 16 + 120)
        struct.pack_into("<Q", content, page * 4096 + 16 + 120, last + 1)
    path.write_bytes(content)
    reader = _C.LmdbReader(str(path))
    assert reader.lost_pages == 1 and reader.records("image", [1, 299, 300]) == [b"x" * 500, b"x" * 500, None]
    assert not reader.damaged


def test_a_damaged_root_alone_loses_nothing(tmp_path):
    entries = {b"image-%09d" % i: b"%d" % i * 100 for i in range(1, 1000)}
    path = Path(make(tmp_path, entries))
    content = bytearray(path.read_bytes())
    root = max((struct.unpack_from("<QQQ", content, page * 4096 + 16 + 112) for page in range(2)), key=lambda m: m[2])[
        0
    ]
    content[root * 4096 : root * 4096 + 64] = bytes(64)
    path.write_bytes(content)
    reader = _C.LmdbReader(str(path))
    assert reader.damaged and reader.lost_pages == 0 and reader.largest_number("image") == 999
    assert reader.get(list(entries)) == list(entries.values())
    assert reader.get(ABSENT) == [None] * len(ABSENT)


def test_a_tree_that_points_at_itself_ends_and_its_leaves_are_found(tmp_path):
    path = Path(make(tmp_path, {b"image-%09d" % i: b"x" * 100 for i in range(1, 2000)}))
    content = bytearray(path.read_bytes())
    metas = [struct.unpack_from("<QQQ", content, page * 4096 + 16 + 112) for page in range(2)]
    root = max(metas, key=lambda meta: meta[2])[0]
    assert struct.unpack_from("<H", content, root * 4096 + 10)[0] & 1, "the root must be a branch page"
    keys = struct.unpack_from("<H", content, root * 4096 + 12)[0] // 2 - 8
    for offset in struct.unpack_from(f"<{keys}H", content, root * 4096 + 16):
        struct.pack_into("<IH", content, root * 4096 + offset, root, 0)
    path.write_bytes(content)
    reader = _C.LmdbReader(str(path))
    assert not reader.damaged
    assert reader.records("image", [1, 1000, 2000]) == [b"x" * 100, b"x" * 100, None] and reader.damaged


@pytest.mark.parametrize("digits", [1, 8, 9])
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_keys_are_surveyed_as_a_scan_of_all_keys_finds_them(tmp_path, count, digits):
    rng = random.Random(count)
    entries = {b"image-%0*d" % (digits, i): rng.randbytes(20) for i in range(3, 3 + count)}
    entries |= {key.replace(b"image", b"label"): b"x" * rng.randrange(900) for key in entries}
    odd = {b"image-00000000000007": b"", b"image-x": b"", b"image-": b"", b"imagination": b"", b"image-1 ": b""}
    path = make(tmp_path, entries | (odd if count == 7 else {}) | {b"num-samples": b"1"})
    reader, other = _C.LmdbReader(path), lmdb_read._PackageReader(path)
    strange = 4 if count == 7 else 0
    expected = (count + strange, count, 3 if count else 0, count + 2 if count else 0, min(count, 5))
    assert reader.survey("image", digits, 3, 7) == other.survey("image", digits, 3, 7) == expected
    first = min((key for key in (entries | odd if count == 7 else entries) if key.startswith(b"image-")), default=None)
    assert reader.first_key(b"image-") == other.first_key(b"image-") == first
    assert reader.first_key(b"zzz") is other.first_key(b"zzz") is None
    keys = sorted(key for key in entries if key.startswith(b"label"))
    numbers = [int(key[6:]) for key in keys]
    assert (
        reader.records("label", numbers, digits)
        == other.records("label", numbers, digits)
        == [entries[k] for k in keys]
    )


def test_a_survey_of_pages_that_point_at_each_other_ends(tmp_path):
    path = Path(make(tmp_path, {b"image-%09d" % i: b"x" * 100 for i in range(1, 20_001)}))
    content = bytearray(path.read_bytes())
    branches = [i for i in range(2, len(content) // 4096) if content[4096 * i + 10] & 1]
    for number in branches:  # every child is a branch page again
        lower = struct.unpack_from("<H", content, 4096 * number + 12)[0]
        for i in range((lower - 16) // 2):
            at = 4096 * number + struct.unpack_from("<H", content, 4096 * number + 16 + 2 * i)[0]
            struct.pack_into("<I", content, at, branches[i % len(branches)])
    path.write_bytes(content)
    assert len(branches) > 2
    assert _C.LmdbReader(os.fsencode(path)).survey("image", 9, 0, 0)[0] == 0
