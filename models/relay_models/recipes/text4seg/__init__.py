"""The training recipe of Text4Seg models: data, augmentation, questions, features, training, metrics, evaluation."""
