"""Clients for the service, over REST or gRPC; they need neither torch nor kserve.

with Florence2Client("http://localhost:8080") as client:
    client.infer("street.jpg", "<CAPTION>")  # {'<CAPTION>': 'A street at night.'}
    client.ask("street.jpg", "<OD>").to_pandas()
"""

from florence2_kserve.client.aio import AsyncFlorence2Client
from florence2_kserve.client.errors import (
    ClientError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RowError,
    ServerError,
    UnavailableError,
)
from florence2_kserve.client.items import Detection, OcrRegion, RunLengths, Segment
from florence2_kserve.client.jobs import Job, Outcome
from florence2_kserve.client.results import (
    Answer,
    Caption,
    Detections,
    DetectionsOrMasks,
    Masks,
    OcrRegions,
    read_answer,
)
from florence2_kserve.client.sync import Florence2Client

__all__ = [
    "Answer",
    "AsyncFlorence2Client",
    "Caption",
    "ClientError",
    "DeadlineError",
    "Detection",
    "Detections",
    "DetectionsOrMasks",
    "Florence2Client",
    "InvalidRequestError",
    "Job",
    "Masks",
    "NotFoundError",
    "OcrRegion",
    "OcrRegions",
    "Outcome",
    "OverloadedError",
    "RowError",
    "RunLengths",
    "Segment",
    "ServerError",
    "UnavailableError",
    "read_answer",
]
