"""The decoding axis: how an answer is drawn. Importing this package registers the built-in kinds."""

from pegbox.decode import best_of, emulated, scaled, transfer_q
from pegbox.decode.base import DECODE, DecodeContext, Decoder, Decoding, Session

__all__ = ["DECODE", "DecodeContext", "Decoder", "Decoding", "Session", "best_of", "emulated", "scaled", "transfer_q"]
