"""Structured pruning: the sparse baseline."""

from .budget import fit_channels
from .channels import ChannelGroup, find_channel_groups
from .classifier import ChannelGate, SparseClassifier
from .removal import remove_channels

__all__ = [
    'ChannelGate',
    'ChannelGroup',
    'SparseClassifier',
    'find_channel_groups',
    'fit_channels',
    'remove_channels',
]
