"""Data for unlearning: loaders, the splits of the paper, and batches that mix forget and retain.

Importing this module reads nothing and imports neither scikit-learn, Pillow, YAML nor transformers.
"""

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.catalogue import DataInfo, available, load
from rfa_fast.data.collate import collate, collate_mixed, collate_text
from rfa_fast.data.datasets import ImageDataset, MixedDataset, QADataset, TextDataset, ids_of
from rfa_fast.data.folders import FolderDataset, load_image_folder
from rfa_fast.data.images import load_digits, load_fashion_mnist, load_mnist_5k, load_npz
from rfa_fast.data.records import load_records
from rfa_fast.data.sampler import ForgetRetainBatchSampler
from rfa_fast.data.splits import (
    Split,
    split_by_class,
    split_by_keyword,
    split_by_sample,
    stratified_split,
    validation_split,
)
from rfa_fast.data.texts import load_bbc_news, load_trivia, load_wordnet
from rfa_fast.data.tokens import QA_TEMPLATE, TokenDataset, tokenise_lm, tokenise_qa, tokenise_texts

__all__ = [
    "QA_TEMPLATE",
    "DataBundle",
    "DataInfo",
    "FolderDataset",
    "ForgetRetainBatchSampler",
    "ImageDataset",
    "MixedDataset",
    "QADataset",
    "Split",
    "TextDataset",
    "TokenDataset",
    "available",
    "collate",
    "collate_mixed",
    "collate_text",
    "ids_of",
    "load",
    "load_bbc_news",
    "load_digits",
    "load_fashion_mnist",
    "load_image_folder",
    "load_mnist_5k",
    "load_npz",
    "load_records",
    "load_trivia",
    "load_wordnet",
    "split_by_class",
    "split_by_keyword",
    "split_by_sample",
    "stratified_split",
    "tokenise_lm",
    "tokenise_qa",
    "tokenise_texts",
    "validation_split",
]
