"""Passes that turn dense feed-forward networks into experts: pure functions on weights."""

from dist_moe.models.conversion.bert import BertConversionConfig, convert_bert, place_converted
from dist_moe.models.conversion.decoder import DecoderConversionConfig, convert_decoder
from dist_moe.models.conversion.importance import neuron_importance
from dist_moe.models.conversion.networks import copies, partition, ranked, split_exactly, take_neurons

__all__ = [
    "BertConversionConfig",
    "DecoderConversionConfig",
    "convert_bert",
    "convert_decoder",
    "copies",
    "neuron_importance",
    "partition",
    "place_converted",
    "ranked",
    "split_exactly",
    "take_neurons",
]
