"""Text in and out: tokens, chat templates, sampling, stop strings, the generation loop, chats."""
