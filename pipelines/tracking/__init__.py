"""The only folder that knows MLflow: what a run tells the tracking server, and what was published there.

Training calls the methods of `Run`; they hand records to one background thread (`outbox.py`) and return at once. A
server that does not answer changes nothing for training: records wait in the run folder and are sent when it is back,
if need be by a later process. A record may be sent twice and still counts once:

- a point carries the time at which it was made, and MLflow stores equal points once;
- a resumed run computes again what came after its checkpoint: points at steps that the run already has are left out;
- a run, a published model and a model version carry a key of ours and are looked up before they are made.
"""

from pipelines.tracking.published import CHALLENGER, fetch_published
from pipelines.tracking.run import Run, Status
from pipelines.tracking.server import Tracking, add_to_run, end_run, open_run, send_outbox

__all__ = [
    "CHALLENGER",
    "Run",
    "Status",
    "Tracking",
    "add_to_run",
    "end_run",
    "fetch_published",
    "open_run",
    "send_outbox",
]
