"""Source and remote on an S3 bucket: moto's server stands in for Amazon's, and is asked over HTTP."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.common.artifacts import folder_hash
from components.common.contracts import Canonical
from tests.parts import need

if TYPE_CHECKING:
    from tests.conftest import Project

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
ROWS, ITEMS, DAY_SECONDS = 400, 20, 86_400


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A client of the server, with the empty buckets `clicks` and `store`."""
    need("s3")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
    )
    for name in ("clicks", "store"):
        client.create_bucket(Bucket=name)
    yield client
    server.stop()


@pytest.fixture(scope="module")
def project(bucket: Any, new_project: Callable[[str], Project]) -> Project:
    """With its source on the bucket: two days of impressions, the items, and a picture of each but one."""
    project = new_project("bucket")
    project.env.update(KEYS, AWS_ENDPOINT_URL=bucket.meta.endpoint_url)
    put_day(bucket, 1)
    put_day(bucket, 2)
    for item in range(1, ITEMS):
        image = io.BytesIO()
        Image.new("RGB", (8, 8), (item, 0, 0)).save(image, "PNG")
        bucket.put_object(Bucket="clicks", Key=f"raw/photos/{item}.png", Body=image.getvalue())
    photos = [None, *(f"photos/{item}.png" for item in range(1, ITEMS))]
    put(bucket, "raw/items.parquet", pa.table({"item_id": range(ITEMS), "image": photos}))
    table = {"columns": {}, "numeric": []}
    project.set_params(
        {
            "ingest.files.events": table | {"path": "events/*.parquet", "categorical": ["device"]},
            "ingest.files.items": table | {"path": "items.parquet", "categorical": []},
        }
    )
    project.python("-m", "components", "use", "files", "--raw", "s3://clicks/raw")
    project.set_params({"ingest.until": "2026-03-04T00:00:00+00:00"})
    return project


def put(bucket: Any, key: str, table: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(table, file)
    bucket.put_object(Bucket="clicks", Key=key, Body=file.getvalue())


def put_day(bucket: Any, day: int) -> None:
    rng = np.random.default_rng(day)
    midnight = int(datetime(2026, 3, day, tzinfo=UTC).timestamp())
    table = {
        "user_id": rng.integers(0, 30, ROWS),
        "item_id": rng.integers(0, ITEMS, ROWS),
        "timestamp": midnight + np.sort(rng.choice(DAY_SECONDS, ROWS, replace=False)),
        "label": rng.integers(0, 2, ROWS),
        "device": rng.choice(["tv", "phone"], ROWS),
    }
    put(bucket, f"raw/events/{day}.parquet", pa.table(table))


def repro(project: Project) -> tuple[bool, Canonical]:
    """Whether `dvc repro ingest` ran the stage, and what it wrote."""
    said = project.python("-m", "dvc", "repro", "ingest")
    return "Running stage 'ingest'" in said, Canonical(project.root / "data/canonical")


def test_ingest_runs_again_where_the_bucket_changed(project: Project, bucket: Any) -> None:
    ran, data = repro(project)
    assert ran and len(data.events()) == 2 * ROWS and len(data.items()) == ITEMS
    assert sum(len(table) for table in data.pictures()) == ITEMS - 1
    assert not repro(project)[0]
    put_day(bucket, 3)
    ran, data = repro(project)
    assert ran and len(data.events()) == 3 * ROWS
    bucket.delete_object(Bucket="clicks", Key="raw/events/1.parquet")
    ran, data = repro(project)
    assert ran and len(data.events()) == 2 * ROWS
    facts = json.loads((project.root / "data/canonical/source.json").read_text())
    assert (facts["first_day"], facts["last_day"]) == ("2026-03-02", "2026-03-03")


def test_what_is_pushed_to_a_bucket_can_be_pulled(project: Project) -> None:
    repro(project)
    data = project.root / "data/canonical"
    before = folder_hash(data)
    project.python("-m", "dvc", "remote", "modify", "--local", "local", "url", "s3://store/clickloop")
    project.python("-m", "dvc", "push", "ingest")
    shutil.rmtree(data)
    project.python("-m", "dvc", "cache", "dir", "--local", str(project.root.with_name("another-cache")))
    project.python("-m", "dvc", "pull", "ingest")
    assert folder_hash(data) == before


def test_what_the_bucket_does_not_have(project: Project) -> None:
    words = ("-m", "components", "ingest", "--arrivals", "data/arrivals.json", "--output", "data/other")
    project.set_params({"ingest.raw": "s3://clicks/elsewhere"})
    said = " ".join(project.python(*words, code=1).split())
    assert "ingest.files.events: no file at s3://clicks/elsewhere/events/*.parquet; mend" in said
    project.set_params({"ingest.raw": "s3://nobody/raw"})
    said = " ".join(project.python(*words, code=1).split())
    assert "ingest.files.events: " in said and "Traceback" not in said
    assert not (project.root / "data/other").exists()
