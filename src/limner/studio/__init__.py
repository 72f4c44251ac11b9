"""The studio: loaded models behind one queue, a web page over them, and an HTTP API in OpenAI's form beside it."""
