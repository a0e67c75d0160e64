"""Conversations and chat templates: what the splice of cached prefixes is measured on."""
