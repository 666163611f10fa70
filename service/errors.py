"""What can go wrong with a request, in words that know no HTTP; `api/problems.py` gives each a status.

* ServiceError
  + ModelNotFound          no such model
  + VersionNotFound        no such version of a model that exists
  + VersionRefused         the version is there, but failed its verification
  + ModelUnloaded          the model was unloaded, and doesn't answer until it is loaded
  + NothingActive          a model whose versions answer only when asked for by number
  + VersionActive          an active version can't be deleted
  + TopKOutOfRange         more classes asked for than the model has
  + NoImages               a request without a picture
  + TooManyImages          more pictures in one request than the limit
  + BodyTooLarge           more bytes in one request than the limit
  + UnsupportedBody        a content type that isn't read
  + MalformedBody          a body that isn't what its content type says
  + TensorInvalid          a tensor that this model doesn't take, or an output that it doesn't give
  + NotImplementedHere     a part of a protocol that isn't spoken here
  + InvalidBase64          a picture in JSON that isn't base64
  + QueueFull              no room now; there will be in a moment
  + DeadlineExceeded       the answer would come too late
  + InferenceFailed        the model itself failed on this picture
  + ClientGone             nobody waits for the answer any more
  + NotReady               no model can answer yet or at all, or the service is stopping
  + DatasetNotFound        no such data set
  + JobNotFound            no such job
  + JobStateConflict       what is asked of a job isn't possible in the state that it is in
  + JobFileNotFound        a file of a job that isn't there: not yet, or with another service
  + JobsFull               no more jobs may wait
  + KeyInvalid             an Idempotency-Key that can't be one
  + KeyReused              an Idempotency-Key that came with another request before
  + KeyInUse               the first request with this Idempotency-Key is still being answered
  + DatabaseUnavailable    the database of jobs can't be reached
  + DatasetInUse           a job reads it
  + DatasetRefused         no data set that can be learnt from; `reason` says which rule it breaks
  + CheckFailed            the program that checks data sets failed, not the data set
  + DiskFull               no room in the state folder
  + StateUnwritable        a state folder that the system doesn't let us write
"""

from training import SafelightError


class ServiceError(SafelightError):
    """What the service refuses, and says so to the client."""


class ModelNotFound(ServiceError):
    pass


class VersionNotFound(ServiceError):
    pass


class VersionRefused(ServiceError):
    pass


class ModelUnloaded(ServiceError):
    pass


class NothingActive(ServiceError):
    pass


class VersionActive(ServiceError):
    pass


class TopKOutOfRange(ServiceError):
    pass


class NoImages(ServiceError):
    pass


class TooManyImages(ServiceError):
    pass


class BodyTooLarge(ServiceError):
    pass


class UnsupportedBody(ServiceError):
    pass


class MalformedBody(ServiceError):
    pass


class TensorInvalid(ServiceError):
    pass


class NotImplementedHere(ServiceError):
    pass


class InvalidBase64(ServiceError):
    pass


class QueueFull(ServiceError):
    """`retry_after` is the time in seconds until what waits now is done, from the measured rate."""

    def __init__(self, message: str, *, retry_after: float, **facts: object) -> None:
        super().__init__(message, **facts)
        self.retry_after = retry_after


class DeadlineExceeded(ServiceError):
    pass


class InferenceFailed(ServiceError):
    pass


class ClientGone(ServiceError):
    pass


class NotReady(ServiceError):
    pass


class DatasetNotFound(ServiceError):
    pass


class DatasetInUse(ServiceError):
    pass


class DatasetRefused(ServiceError):
    pass


class CheckFailed(ServiceError):
    pass


class DiskFull(ServiceError):
    pass


class StateUnwritable(ServiceError):
    pass


class JobNotFound(ServiceError):
    pass


class JobStateConflict(ServiceError):
    pass


class JobFileNotFound(ServiceError):
    pass


class JobsFull(ServiceError):
    pass


class KeyInvalid(ServiceError):
    pass


class KeyReused(ServiceError):
    pass


class KeyInUse(ServiceError):
    pass


class DatabaseUnavailable(ServiceError):
    pass
