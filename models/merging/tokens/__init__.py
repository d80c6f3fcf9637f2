"""Tokens of the inputs and of the result: vocabulary rows matched, new tokens, chat templates."""
