"""Publishing to and reading from a real server process that speaks S3."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path

import pytest
from flaky_proxy import FlakyProxy
from s3_server import SECRET, S3Server, client_of

from layerlens.exceptions import OutputError, StorageError
from layerlens.storage import check_publishable, joined, local_copy, publish, read_bytes
from layerlens.storage import lock as lock_module


@pytest.fixture(autouse=True)
def _fresh_clients():
    """fsspec keeps clients by their arguments, and the environment is not one of them."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def result(directory: Path, mark: str, size: int = 1000, **more: str) -> Path:
    """A directory like that of a run, every file of which tells which run it is of."""
    (directory / "peft").mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps({"mark": mark}))
    (directory / "peft/adapter_model.safetensors").write_text(mark * size)
    for name, text in more.items():
        (directory / name).write_text(text)
    return directory


def keys(s3: S3Server, bucket: str) -> list[str]:
    listed = client_of(s3).list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    return [entry["Key"] for entry in listed.get("Contents", [])]


def test_what_is_published_reads_back_and_nothing_else_is_left(s3, bucket, tmp_path):
    publish(result(tmp_path / "one", "1"), f"{bucket}/out")
    assert json.loads(read_bytes(f"{bucket}/out/manifest.json")) == {"mark": "1"}
    copy = local_copy(f"{bucket}/out")
    assert (copy / "peft/adapter_model.safetensors").read_text() == "1" * 1000
    assert local_copy(f"{bucket}/out/manifest.json").name == "manifest.json"
    assert keys(s3, bucket) == ["out/checksums.json", "out/manifest.json", "out/peft/adapter_model.safetensors"]


def test_a_new_result_replaces_what_it_owns_and_leaves_the_rest(s3, bucket, tmp_path):
    publish(result(tmp_path / "one", "1", old="old"), f"{bucket}/out")
    client_of(s3).put_object(Bucket=bucket.removeprefix("s3://"), Key="out/mine.txt", Body=b"mine")
    publish(result(tmp_path / "two", "2"), f"{bucket}/out", owned=("manifest.json", "peft", "old"))
    assert keys(s3, bucket) == [
        "out/checksums.json", "out/manifest.json", "out/mine.txt", "out/peft/adapter_model.safetensors",
    ]  # fmt: skip
    assert (local_copy(f"{bucket}/out") / "peft/adapter_model.safetensors").read_text() == "2" * 1000


@pytest.mark.parametrize("name", ["manifest.json", "peft/adapter_model.safetensors"])
def test_an_object_that_was_changed_is_not_used(s3, bucket, tmp_path, monkeypatch, name):
    monkeypatch.setattr("layerlens.storage.fetch.PAUSE_S", 0.01)
    publish(result(tmp_path / "one", "1"), f"{bucket}/out")
    client_of(s3).put_object(Bucket=bucket.removeprefix("s3://"), Key=f"out/{name}", Body=b'{"mark": "x"}')
    with pytest.raises(StorageError, match="does not match its checksum"):
        read_bytes(joined(f"{bucket}/out", name))
    with pytest.raises(StorageError, match="does not match its checksum"):
        local_copy(f"{bucket}/out")
    assert not any((Path(os.environ["LAYERLENS_CACHE"]) / "downloads").iterdir())


def test_missing_objects_buckets_and_credentials_are_one_line(bucket, tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="there is no such object"):
        read_bytes(f"{bucket}/out/manifest.json")
    with pytest.raises(OutputError, match=r"cannot write s3://no-such-bucket/out: .*NoSuchBucket"):
        check_publishable("s3://no-such-bucket/out")


@pytest.mark.parametrize("budget", [2_000, 400_000, 900_000])
def test_a_store_that_goes_down_in_mid_upload_keeps_the_earlier_result(
    s3, bucket, tmp_path, monkeypatch, caplog, budget
):
    """Cut in the first object, in the large one, and late in it (1 MB in all)."""
    publish(result(tmp_path / "one", "1"), f"{bucket}/out")
    before = keys(s3, bucket)
    proxy = FlakyProxy(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    check_publishable(f"{bucket}/out")
    proxy.budget = budget
    with caplog.at_level(logging.DEBUG), pytest.raises(OutputError, match="cannot write s3://") as caught:
        publish(result(tmp_path / "two", "2", size=1_000_000), f"{bucket}/out", owned=("manifest.json", "peft"))
    assert SECRET not in caplog.text + str(caught.value)
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    s3fs.S3FileSystem.clear_instance_cache()
    assert [key for key in keys(s3, bucket) if "/.layerlens-upload-" not in key] == before
    assert json.loads(read_bytes(f"{bucket}/out/manifest.json")) == {"mark": "1"}
    assert (local_copy(f"{bucket}/out") / "peft/adapter_model.safetensors").read_text() == "1" * 1000
    publish(result(tmp_path / "again", "3"), f"{bucket}/out")
    assert json.loads(read_bytes(f"{bucket}/out/manifest.json")) == {"mark": "3"}


def test_of_writers_at_the_same_time_one_result_stays_whole(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "POLL_S", 0.02)
    errors: list[BaseException] = []

    def write(mark: str) -> None:
        try:
            publish(result(tmp_path / mark, mark), f"{bucket}/out", owned=("manifest.json", "peft"))
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write, args=(mark,)) for mark in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not errors
    copy = local_copy(f"{bucket}/out")  # holds every file against its checksum
    mark = json.loads((copy / "manifest.json").read_text())["mark"]
    assert set((copy / "peft/adapter_model.safetensors").read_text()) == {mark}


def test_the_lock_of_a_publisher_that_died_is_taken_over(s3, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_S", 0.3)
    monkeypatch.setattr(lock_module, "POLL_S", 0.05)
    name = bucket.removeprefix("s3://")
    body = json.dumps({"holder": "dead", "count": 7}).encode()
    client_of(s3).put_object(Bucket=name, Key=f"out/{lock_module.LOCK_FILE}", Body=body)
    publish(result(tmp_path / "one", "1"), f"{bucket}/out")
    assert json.loads(read_bytes(f"{bucket}/out/manifest.json")) == {"mark": "1"}
    assert not [key for key in keys(s3, bucket) if lock_module.LOCK_FILE in key]


def test_a_publisher_that_works_keeps_its_lock(s3, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(lock_module, "POLL_S", 0.05)
    name = bucket.removeprefix("s3://")
    body = json.dumps({"holder": "alive", "count": 7}).encode()
    client_of(s3).put_object(Bucket=name, Key=f"out/{lock_module.LOCK_FILE}", Body=body)
    with pytest.raises(OutputError, match="another run has been publishing here"):
        publish(result(tmp_path / "one", "1"), f"{bucket}/out")
    assert keys(s3, bucket) == [f"out/{lock_module.LOCK_FILE}"]
