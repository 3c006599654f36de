"""Mistakes that type checkers find: one a line that ends with the word wrong."""

import asyncio

from splitserve import AsyncClient, Client

client = Client(8000)  # wrong
client.infer("m", [[1]], versions="1.1")  # wrong
client.infer("m", [[1]], extra="ignore")  # wrong
client.infer(1, [[1]])  # wrong
client.is_ready() + "?"  # wrong
client.infer("m", [[1]]).to_json()  # wrong
AsyncClient(compression="zip")  # wrong
asyncio.run(client.infer("m", [[1]]))  # wrong
