"""The server: an OpenAI-compatible HTTP API in front of one model that answers many requests in one running batch.

app, chat, contexts_api   HTTP: routes and what they answer          asyncio's thread
gate                      keys, origins, sizes: before a body is read
wording, schema           requests to token ids                      worker threads
engine, batch, answering  the model: prefill and decode by turns     ONE thread of its own
contexts                  what was read: files and their index       worker threads
"""
