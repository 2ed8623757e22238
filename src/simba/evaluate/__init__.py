"""Experiments that measure what pruning does to a model: the paper's, and more."""

from simba.evaluate.ablation import PAPER_KEEPS, ablate
from simba.evaluate.cells import DENSE, Cell
from simba.evaluate.contexts import ContextCell, perplexity_by_context
from simba.evaluate.flops_curve import Point, curve
from simba.evaluate.information_flow import FlowCell, flow
from simba.evaluate.intervals import Interval, bootstrap, bootstrap_ratio
from simba.evaluate.lm_eval_tasks import PAPER_TASKS, TaskCell, tasks
from simba.evaluate.passage_recall import RECALL_KEEPS, RIVALS, RecallCell, recall
from simba.evaluate.perplexity import SnippetLoss, snippet_loss, windows
from simba.evaluate.prefill_time import SpeedCell, speed
from simba.evaluate.prompt_cut import cut_length
from simba.evaluate.prose import KINDS as PROSE_TASKS
from simba.evaluate.synthetic import TASKS, Rows, Task, passkey_in_text, task_of
from simba.evaluate.texts import Document, read_dataset, read_documents, tokenize
from simba.evaluate.token_redundancy import RedundancyCell, adjacent_similarity, redundancy
from simba.evaluate.trained import AnswerCell, hidden_passkey, prose_task, trained_task

__all__ = [
    "DENSE",
    "PAPER_KEEPS",
    "PAPER_TASKS",
    "PROSE_TASKS",
    "RECALL_KEEPS",
    "RIVALS",
    "TASKS",
    "AnswerCell",
    "Cell",
    "ContextCell",
    "Document",
    "FlowCell",
    "Interval",
    "Point",
    "RecallCell",
    "RedundancyCell",
    "Rows",
    "SnippetLoss",
    "SpeedCell",
    "Task",
    "TaskCell",
    "ablate",
    "adjacent_similarity",
    "bootstrap",
    "bootstrap_ratio",
    "curve",
    "cut_length",
    "flow",
    "hidden_passkey",
    "passkey_in_text",
    "perplexity_by_context",
    "prose_task",
    "read_dataset",
    "read_documents",
    "recall",
    "redundancy",
    "snippet_loss",
    "speed",
    "task_of",
    "tasks",
    "tokenize",
    "trained_task",
    "windows",
]
