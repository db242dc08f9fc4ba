"""Models from the Hub: what a repository holds, bringing it here whole, and knowing later that it is whole.

| module | holds |
|---|---|
| `names` | which repository and revision a text means |
| `files` | the files of a revision, checked before any of it becomes a path, and which of them inference needs |
| `client` | every request to the Hub, with retries, and the user's settings that huggingface_hub reads |
| `failures` | which failures pass by themselves, and what a person should read about the others |
| `xet` | bytes from xet storage |
| `store` | a model's folder on disk: the marker of a complete download, parts still to be completed, the lock |
| `transfer` | one file, from wherever it stopped to its verified end, and several at a time |
| `download` | a whole model: the order, how much of it is here, free disk, the rest fetched and put in place |
| `branches` | the quantizations that a repository offers in its branches |

huggingface_hub does the talking (session, login, proxies, metadata, errors), but not the writing of files:

- `hf_hub_download` writes, since 1.18, to a temporary file of a random name that it deletes on failure, which leaves
  nothing to resume from (huggingface_hub pull request 4228, and still so in 2.4);
- `file_download.http_get` continues a part, but hands bytes on in blocks of 10 MiB (`DOWNLOAD_CHUNK_SIZE`): a kill, a
  reset or Ctrl-C loses or waits for as much of every file, and a line that breaks off more often than that never gets
  anywhere. It sleeps through a 429 without a word, however long, appends what a 206 holds, wherever that begins, and
  goes one call deeper for each retry. In 1.0 it also appends a whole file to its own part.

40 GB over a shaky line need better than that. So the bytes are ours: its session's stream with a Range, or hf-xet's
from an offset, appended to a part file that stays.
"""
