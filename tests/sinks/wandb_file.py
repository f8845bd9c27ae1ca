"""Reads a ``.wandb`` file back with W&B's own protocol buffers.

W&B's file is a LevelDB log: 7 bytes of its own, then blocks of 32 KiB, in them records of CRC,
length and type, a record that does not fit going on in the next block.
"""

import json
import struct
from pathlib import Path

BLOCK = 32 * 1024
OWN_HEADER = b":W&B"
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    from wandb.proto import wandb_internal_pb2

    data = Path(path).read_bytes()
    assert data.startswith(OWN_HEADER)
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _crc, length, kind = struct.unpack("<IHB", data[position : position + 7])
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read(path):
    """Return what the file says.

    They are the rows of the history, summary, files, config, exit code, the run's id, project, group,
    tags, notes, type of job and sweep, alerts as title and text, and step metrics by the metric's
    pattern.
    """
    found = {
        "history": [],
        "summary": {},
        "files": [],
        "config": {},
        "exit_code": None,
        "id": "",
        "project": "",
        "group": "",
        "tags": [],
        "notes": "",
        "job_type": "",
        "sweep_id": "",
        "alerts": [],
        "step_metrics": {},
    }
    for record in records(path):
        match record.WhichOneof("record_type"):
            case "history":
                found["history"].append(values(record.history.item))
            case "summary":
                found["summary"] |= values(record.summary.update)
            case "files":
                found["files"] += [file.path for file in record.files.files]
            case "run":
                found["config"] |= values(record.run.config.update)
                found["id"], found["project"] = record.run.run_id, record.run.project
                found["group"], found["tags"] = record.run.run_group, list(record.run.tags)
                for name in ("notes", "job_type", "sweep_id"):
                    found[name] = getattr(record.run, name)
            case "alert":
                found["alerts"].append((record.alert.title, record.alert.text))
            case "metric":
                name = record.metric.name or record.metric.glob_name
                found["step_metrics"][name] = record.metric.step_metric
            case "config":
                found["config"] |= values(record.config.update)
            case "exit":
                found["exit_code"] = record.exit.exit_code
    return found
