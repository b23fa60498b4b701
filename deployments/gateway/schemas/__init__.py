"""What a client may write and what it reads back; the OpenAPI document is made of these."""
