"""The server's side."""

from fedprior.federation import server_app
from job.task import ALGORITHM, MODEL, held_out

app = server_app(ALGORITHM, MODEL, test=held_out())
