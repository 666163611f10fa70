"""What a model file is: the manifest, the store, and how picture bytes become inputs and logits become answers.

The one part of training that the service imports. It needs no torch. Its errors:

* BundleError
  + ManifestInvalid
  + FileMissing
  + DigestMismatch
  + FileMalformed
  + GoldenMismatch
  + NameInvalid
* NameTaken
* ImageRejected
  + NotAnImage
  + ImageTooLarge
  + ImageCorrupt
"""
