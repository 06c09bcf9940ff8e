"""The node's side: a process that stays between messages. This file must not import PyTorch, or fedprior."""

from fedprior_node import resident_app

app = resident_app("job.task:node")
