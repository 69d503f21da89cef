"""The shape of the jobs that write shards: read and transform, bring buckets together, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spark_jobs.session import run_with_progress, spark_session
from spark_jobs.shard_writer import MESSAGE_DDL, ROW_DDL
from spark_jobs.sources import InputFile, plan_tasks, split_bytes_for


def run_two_stages(
    app: str, title: str, files: Sequence[InputFile], master: str, scratch: str, num_tasks: int,
    num_buckets: int, stages: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Run both stages on Spark; the messages, one a shard and one of the counters.

    stages: makes the functions of the two stages from (Spark context, broadcast tasks, broadcast
    files, broadcast paths). Rows reach the second one sorted by (bucket, h, key, input).
    """
    with spark_session(master, f"leyden {app}", scratch=scratch) as spark:
        context = spark.sparkContext
        total = sum(file.size for file in files)
        tasks = plan_tasks(files, split_bytes_for(total, context.defaultParallelism, num_tasks))
        paths = context.broadcast([file.path for file in files])
        first, second = stages(context, context.broadcast(tasks), context.broadcast(files), paths)
        num_parts = num_buckets + 1
        messages = (
            spark.range(0, len(tasks), 1, len(tasks))
            .mapInArrow(first, ROW_DDL)
            .repartitionById(num_parts, "bucket")
            # The input decides between files of equal relative path in two folders.
            .sortWithinPartitions("bucket", "h", "key", "input")
            .mapInArrow(second, MESSAGE_DDL)
        )
        rows = run_with_progress(spark, title, len(tasks) + num_parts, messages.collect)
        return [row.asDict() for row in rows]
