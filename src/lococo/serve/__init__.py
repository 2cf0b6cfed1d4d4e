"""The server: an OpenAI-compatible HTTP API in front of one model that answers many requests in one running batch.

connection, gate, journal, keys     before and around a request: who it is from, how large it is, what the log says
app, answer_routes, context_routes  what clients ask for; schema, shapes and replies have the forms of it
wording                             messages to token ids
apart                               files to text, in a process of its own
pending, feed, jobs                 between the event loop and the engine
engine, batch, answering            the model, read and asked by ONE thread: prefill and decode by turns
conversations, contexts             slots that are kept, in memory and on disk
state, server, ray                  the parts put together, and their end; the same as replicas
"""
