"""Persistent 4-bit KV caches for many LLM agents on one machine."""

__version__ = "0.1.0"
