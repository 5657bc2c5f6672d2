"""Rows as text and tokens: prompts, chat templates, control tokens that a row spells."""
