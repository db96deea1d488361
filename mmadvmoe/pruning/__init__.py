"""Structured pruning: the sparse baseline."""

from .channels import ChannelGroup, find_channel_groups, fit_channels, remove_channels
from .classifier import ChannelGate, SparseClassifier

__all__ = ['ChannelGate', 'ChannelGroup', 'SparseClassifier', 'find_channel_groups', 'fit_channels', 'remove_channels']
