"""How the library reaches into a Hugging Face decoder, and what it has to know of one."""
