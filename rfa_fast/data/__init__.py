"""Data for unlearning: loaders, the splits of the paper, and batches that mix forget and retain.

Importing this module reads nothing and imports neither scikit-learn, Pillow, YAML nor transformers.
"""

from rfa_fast.data.bundle import DataBundle
from rfa_fast.data.catalogue import DataInfo, available, load
from rfa_fast.data.choices import ChoiceDataset
from rfa_fast.data.cifar import load_cifar_10
from rfa_fast.data.collate import collate, collate_mixed, collate_text
from rfa_fast.data.datasets import ImageDataset, MixedDataset, QADataset, Repeated, TextDataset, ids_of
from rfa_fast.data.eli5 import load_eli5_category
from rfa_fast.data.folders import FolderDataset, load_image_folder
from rfa_fast.data.images import load_digits, load_fashion_mnist, load_mnist_5k
from rfa_fast.data.imdb import load_imdb
from rfa_fast.data.keywords import Keyword, keyword_candidates, split_by_keyword
from rfa_fast.data.npz import load_npz
from rfa_fast.data.records import load_records
from rfa_fast.data.resize import resized
from rfa_fast.data.sampler import ForgetRetainBatchSampler
from rfa_fast.data.splits import (
    Split,
    split_by_class,
    split_by_sample,
    stratified_split,
    validation_split,
)
from rfa_fast.data.texts import load_bbc_news, load_trivia, load_wordnet
from rfa_fast.data.tokens import QA_TEMPLATE, TokenDataset, tokenise_lm, tokenise_qa, tokenise_texts
from rfa_fast.data.wmdp import load_wmdp, load_wmdp_corpora

__all__ = [
    "QA_TEMPLATE",
    "ChoiceDataset",
    "DataBundle",
    "DataInfo",
    "FolderDataset",
    "ForgetRetainBatchSampler",
    "ImageDataset",
    "Keyword",
    "MixedDataset",
    "QADataset",
    "Repeated",
    "Split",
    "TextDataset",
    "TokenDataset",
    "available",
    "collate",
    "collate_mixed",
    "collate_text",
    "ids_of",
    "keyword_candidates",
    "load",
    "load_bbc_news",
    "load_cifar_10",
    "load_digits",
    "load_eli5_category",
    "load_fashion_mnist",
    "load_image_folder",
    "load_imdb",
    "load_mnist_5k",
    "load_npz",
    "load_records",
    "load_trivia",
    "load_wmdp",
    "load_wmdp_corpora",
    "load_wordnet",
    "resized",
    "split_by_class",
    "split_by_keyword",
    "split_by_sample",
    "stratified_split",
    "tokenise_lm",
    "tokenise_qa",
    "tokenise_texts",
    "validation_split",
]
