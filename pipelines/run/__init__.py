"""One run: where everything lies, from what it was made, and what is finished."""
