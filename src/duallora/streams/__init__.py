"""Streams: data sets turned into tasks that are learned one after another."""

from __future__ import annotations

from duallora.streams.collection import Scenario, StreamEntry
from duallora.streams.digits import DigitsDataset, digits
from duallora.streams.domains import DOMAINS, with_domains
from duallora.streams.folder import BadImagesError, FolderDataset, evaluation_folder, train_and_val
from duallora.streams.listed import ListedImages, stratified
from duallora.streams.load import load
from duallora.streams.permuted_digits import PermutedDigitsDataset
from duallora.streams.registry import STREAMS
from duallora.streams.repeats import with_repeats
from duallora.streams.split import split
from duallora.streams.task import (
    Stream,
    Task,
    TaskDataset,
    all_at_once,
    as_task_dataset,
    check_class_names,
    hold_back,
)

__all__ = [
    "DOMAINS",
    "STREAMS",
    "BadImagesError",
    "DigitsDataset",
    "FolderDataset",
    "ListedImages",
    "PermutedDigitsDataset",
    "Scenario",
    "Stream",
    "StreamEntry",
    "Task",
    "TaskDataset",
    "all_at_once",
    "as_task_dataset",
    "check_class_names",
    "digits",
    "evaluation_folder",
    "hold_back",
    "load",
    "split",
    "stratified",
    "train_and_val",
    "with_domains",
    "with_repeats",
]
