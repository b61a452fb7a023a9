"""A part whose port answers but that cannot do its work is not up, and trying it leaves nothing behind."""

from __future__ import annotations

import os
import shutil

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from pyarrow import fs as pafs

from infra import checks, servers
from infra.processes import free_ports, start, stop, wait_until_serving
from infra.servers import BUCKET, S3_ADMIN_PARTNER, S3_PORTS


@pytest.fixture
def s3(s3_endpoint: str) -> pafs.FileSystem:
    return pafs.S3FileSystem(
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_REGION"],
        endpoint_override=s3_endpoint.removeprefix("http://"),
        scheme="http",
    )


def test_s3_that_gives_back_other_bytes_does_not_serve(s3):
    checks.s3_works(s3, BUCKET)
    assert checks.s3_answers(s3, BUCKET)
    with s3.open_output_stream(f"{BUCKET}/{checks.KEPT}") as stream:
        stream.write(b"other bytes")
    with pytest.raises(OSError, match="other bytes than were written"):
        checks.s3_answers(s3, BUCKET)
    s3.delete_file(f"{BUCKET}/{checks.KEPT}")
    assert not checks.s3_answers(s3, BUCKET), "a user may empty the bucket"
    checks.s3_works(s3, BUCKET)
    assert checks.s3_answers(s3, BUCKET)
    assert [i for i in s3.get_file_info(pafs.FileSelector(BUCKET)) if i.base_name.startswith(".probe-")] == []


@pytest.mark.servers
def test_s3_without_its_volumes_answers_and_is_not_up(tmp_path, short_folder):
    # As for some seconds after a restart: the port, and the list of objects, are there before the bytes are.
    ports = free_ports(S3_PORTS, partner=S3_ADMIN_PARTNER)
    server = servers.s3_server(tmp_path / "data", ports, "key", "secret-key", short_folder / "volumes")
    running = start(server, tmp_path / "log")
    try:
        wait_until_serving(server, running, tmp_path / "log")
        stop(running, server.leftovers)
        volumes = [*(tmp_path / "data").glob(f"{BUCKET}_*")]
        assert volumes
        for path in volumes:
            shutil.move(path, tmp_path)
        running = start(server, tmp_path / "log")
        client = pafs.S3FileSystem(
            access_key="key",
            secret_key="secret-key",
            region=servers.REGION,
            endpoint_override=server.url.removeprefix("http://"),
            scheme="http",
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=10),
        )
        while True:
            try:
                found = client.get_file_info([BUCKET, f"{BUCKET}/{checks.KEPT}"])
                if all(info.type != pafs.FileType.NotFound for info in found):
                    break
            except OSError:
                continue
        with pytest.raises(OSError, match=r"INTERNAL_FAILURE|HTTP status 500"):
            server.works()
    finally:
        stop(running, server.leftovers)


def test_mlflow_is_tried_with_a_run_that_nobody_sees(mlflow_server: str):
    client = MlflowClient(mlflow_server)
    before = {experiment.name for experiment in client.search_experiments()}
    assert checks.PROBE not in before
    (probe,) = [e for e in client.search_experiments(ViewType.DELETED_ONLY) if e.name == checks.PROBE]
    checks.mlflow_works(mlflow_server, {})
    assert {experiment.name for experiment in client.search_experiments()} == before
    assert len(client.search_runs([probe.experiment_id], run_view_type=ViewType.ALL)) == 1, "the same one each time"
