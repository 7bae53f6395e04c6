BEGIN TRANSACTION;
CREATE TABLE adapters (
	id INTEGER NOT NULL, 
	namespace VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	last_version INTEGER NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_adapters PRIMARY KEY (id), 
	CONSTRAINT ck_adapters_last_version_not_negative CHECK (last_version >= 0), 
	CONSTRAINT ck_adapters_name_length CHECK (length(name) <= 96), 
	CONSTRAINT ck_adapters_namespace_length CHECK (length(namespace) <= 96), 
	CONSTRAINT uq_adapters_namespace_name UNIQUE (namespace, name)
);
INSERT INTO "adapters" VALUES(1,'','support-bot',3,'2025-03-01 12:00:00.000000');
INSERT INTO "adapters" VALUES(2,'team','bot',1,'2025-03-01 12:00:00.000000');
INSERT INTO "adapters" VALUES(3,'','gone',4,'2025-03-01 12:00:00.000000');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE aliases (
	id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	checkpoint_id INTEGER NOT NULL, 
	CONSTRAINT pk_aliases PRIMARY KEY (id), 
	CONSTRAINT ck_aliases_name_length CHECK (length(name) <= 96), 
	CONSTRAINT fk_aliases_adapter_id_adapters FOREIGN KEY(adapter_id) REFERENCES adapters (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_aliases_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE RESTRICT, 
	CONSTRAINT uq_aliases_adapter_id_name UNIQUE (adapter_id, name)
);
INSERT INTO "aliases" VALUES(1,1,'candidate',2);
CREATE TABLE base_blobs (
	base_id INTEGER NOT NULL, 
	blob_id INTEGER NOT NULL, 
	CONSTRAINT pk_base_blobs PRIMARY KEY (base_id, blob_id), 
	CONSTRAINT fk_base_blobs_base_id_bases FOREIGN KEY(base_id) REFERENCES bases (id) ON DELETE CASCADE, 
	CONSTRAINT fk_base_blobs_blob_id_blobs FOREIGN KEY(blob_id) REFERENCES blobs (id) ON DELETE RESTRICT
);
CREATE TABLE bases (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	url VARCHAR NOT NULL, 
	in_store BOOLEAN NOT NULL, 
	format VARCHAR NOT NULL, 
	weights VARCHAR(64) NOT NULL, 
	architecture VARCHAR(64) NOT NULL, 
	arch_version VARCHAR NOT NULL, 
	document JSON NOT NULL, 
	parameters BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	created_at DATETIME NOT NULL, 
	author VARCHAR NOT NULL, 
	CONSTRAINT pk_bases PRIMARY KEY (id), 
	CONSTRAINT ck_bases_format_known CHECK (format IN ('safetensors', 'litgpt')), 
	CONSTRAINT ck_bases_arch_version_length CHECK (length(arch_version) <= 400), 
	CONSTRAINT ck_bases_architecture_length CHECK (length(architecture) = 64), 
	CONSTRAINT ck_bases_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_bases_name_length CHECK (length(name) <= 400), 
	CONSTRAINT ck_bases_url_length CHECK (length(url) <= 4096), 
	CONSTRAINT ck_bases_weights_length CHECK (length(weights) = 64), 
	CONSTRAINT ck_bases_parameters_not_negative CHECK (parameters >= 0), 
	CONSTRAINT ck_bases_size_bytes_not_negative CHECK (size_bytes >= 0), 
	CONSTRAINT uq_bases_name UNIQUE (name), 
	CONSTRAINT uq_bases_weights UNIQUE (weights)
);
INSERT INTO "bases" VALUES(1,'meta/base','/models/base',0,'safetensors','de8f3fcf327eb911b2c368e011e0ffdee22fed456b4f4508337018ba46a0639d','5696d005e7a36a6053120e5497ac20409953a8e0ccf592394000352aa6a011ab','','{"config": "{\"model_type\": \"llama\"}", "files": [{"path": "model.safetensors", "size_bytes": 160, "identity": "1:2:160:3"}], "tensors": [["lm_head.weight", "BF16", [8, 4], "model.safetensors", 96]], "digests": {"lm_head.weight": "35f1ea002bfb00c125884e650f864046b687e0a48a6edc1a591c459f8c341da5"}}',32,64,'2025-03-01 12:00:00.000000','ada');
CREATE TABLE blobs (
	id INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	CONSTRAINT pk_blobs PRIMARY KEY (id), 
	CONSTRAINT ck_blobs_digest_length CHECK (length(digest) = 64), 
	CONSTRAINT ck_blobs_sha256_length CHECK (length(sha256) IN (0, 64)), 
	CONSTRAINT ck_blobs_size_bytes_not_negative CHECK (size_bytes >= 0), 
	CONSTRAINT uq_blobs_digest UNIQUE (digest)
);
INSERT INTO "blobs" VALUES(1,'3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a','',1000);
CREATE TABLE checkpoint_blobs (
	checkpoint_id INTEGER NOT NULL, 
	blob_id INTEGER NOT NULL, 
	CONSTRAINT pk_checkpoint_blobs PRIMARY KEY (checkpoint_id, blob_id), 
	CONSTRAINT fk_checkpoint_blobs_blob_id_blobs FOREIGN KEY(blob_id) REFERENCES blobs (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_checkpoint_blobs_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE CASCADE
);
INSERT INTO "checkpoint_blobs" VALUES(1,1);
INSERT INTO "checkpoint_blobs" VALUES(2,1);
INSERT INTO "checkpoint_blobs" VALUES(3,1);
CREATE TABLE checkpoints (
	id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	base_id INTEGER NOT NULL, 
	arch_version VARCHAR NOT NULL, 
	run VARCHAR NOT NULL, 
	step BIGINT, 
	source VARCHAR NOT NULL, 
	manifest JSON NOT NULL, 
	created_at DATETIME NOT NULL, 
	author VARCHAR NOT NULL, 
	CONSTRAINT pk_checkpoints PRIMARY KEY (id), 
	CONSTRAINT ck_checkpoints_arch_version_length CHECK (length(arch_version) <= 400), 
	CONSTRAINT ck_checkpoints_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_checkpoints_digest_length CHECK (length(digest) = 64), 
	CONSTRAINT ck_checkpoints_run_length CHECK (length(run) <= 400), 
	CONSTRAINT ck_checkpoints_source_length CHECK (length(source) <= 4096), 
	CONSTRAINT ck_checkpoints_step_not_negative CHECK (step >= 0), 
	CONSTRAINT ck_checkpoints_version_from_one CHECK (version >= 1), 
	CONSTRAINT fk_checkpoints_adapter_id_adapters FOREIGN KEY(adapter_id) REFERENCES adapters (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_checkpoints_base_id_bases FOREIGN KEY(base_id) REFERENCES bases (id) ON DELETE RESTRICT, 
	CONSTRAINT uq_checkpoints_adapter_id_digest UNIQUE (adapter_id, digest), 
	CONSTRAINT uq_checkpoints_adapter_id_version UNIQUE (adapter_id, version)
);
INSERT INTO "checkpoints" VALUES(1,1,1,'36418f3c4910728c2852d7a640fb0efd590c435f073638feeab3ec6fc24c059d',1,'','run-1',100,'/training','{"format": "peft", "method": "lora", "rank": 8, "alpha": 16.0, "scaling": "alpha/r", "targets": ["q_proj", "v_proj"], "dtype": "float32", "parameters": 250, "tensors": 4, "weights_file": "adapter_model.safetensors", "base_name": "meta/base", "files": [{"path": "adapter_model.safetensors", "size_bytes": 1000, "digest": "blake3:3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a", "sha256": ""}], "tokenizer": false}','2025-03-01 12:00:00.000000','ada');
INSERT INTO "checkpoints" VALUES(2,1,3,'f50d7a20626519bbb0178d3510280d1d23e0673daadb7e06fbe296b05d182a48',1,'','run-1',NULL,'/training','{"format": "peft", "method": "lora", "rank": 16, "alpha": null, "scaling": "alpha/r", "targets": ["q_proj", "v_proj"], "dtype": "float32", "parameters": 250, "tensors": 4, "weights_file": "adapter_model.safetensors", "base_name": "meta/base", "files": [{"path": "adapter_model.safetensors", "size_bytes": 1000, "digest": "blake3:3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a", "sha256": ""}], "tokenizer": false}','2025-03-01 12:00:00.000000','ada');
INSERT INTO "checkpoints" VALUES(3,2,1,'92b254e1fb1ff3498a549fb73f4f083d79751b83069df12eaf8e6485b8a16c45',1,'','run-1',300,'/training','{"format": "peft", "method": "lora", "rank": null, "alpha": 0.5, "scaling": "alpha/r", "targets": ["q_proj", "v_proj"], "dtype": "float32", "parameters": 250, "tensors": 4, "weights_file": "adapter_model.safetensors", "base_name": "meta/base", "files": [{"path": "adapter_model.safetensors", "size_bytes": 1000, "digest": "blake3:3edc5c4a5df8c79ef4f8dbdc373cd21ca041ccf39fe5693250d004092094dc4a", "sha256": ""}], "tokenizer": false}','2025-03-01 12:00:00.000000','ada');
CREATE TABLE events (
	number INTEGER NOT NULL, 
	at DATETIME NOT NULL, 
	author VARCHAR NOT NULL, 
	action VARCHAR NOT NULL, 
	subject VARCHAR NOT NULL, 
	detail JSON NOT NULL, 
	previous_hash VARCHAR(64) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	CONSTRAINT pk_events PRIMARY KEY (number), 
	CONSTRAINT ck_events_action_length CHECK (length(action) <= 96), 
	CONSTRAINT ck_events_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_events_hash_length CHECK (length(hash) = 64), 
	CONSTRAINT ck_events_previous_hash_length CHECK (length(previous_hash) = 64), 
	CONSTRAINT ck_events_subject_length CHECK (length(subject) <= 4096), 
	CONSTRAINT uq_events_hash UNIQUE (hash), 
	CONSTRAINT uq_events_previous_hash UNIQUE (previous_hash)
);
INSERT INTO "events" VALUES(1,'2025-03-01 12:00:00.000000','ada','register','support-bot@v1','{"digest": "x"}','0000000000000000000000000000000000000000000000000000000000000000','e251ec0971e6f0985e9df536b1a8f659de08668e1448a7715a1ea7108fb51734');
INSERT INTO "events" VALUES(2,'2025-03-01 12:00:00.000000','ada','register','support-bot@v3','{}','e251ec0971e6f0985e9df536b1a8f659de08668e1448a7715a1ea7108fb51734','b694106436c22e1980991e2bec049a47d2a34e459c45ea0dda7eb71cd581fa14');
INSERT INTO "events" VALUES(3,'2025-03-01 12:00:00.000000','ada','register','team/bot@v1','{}','b694106436c22e1980991e2bec049a47d2a34e459c45ea0dda7eb71cd581fa14','d35301527d040819da9d034c86e56585f1a7cc5d9a2a20ff8297772da7454402');
INSERT INTO "events" VALUES(4,'2025-03-01 12:00:00.000000','ada','base.add','meta/base','{"tensors": 1}','d35301527d040819da9d034c86e56585f1a7cc5d9a2a20ff8297772da7454402','a6e579a674f0f16a5473759d74799882ace75b0db7afd58b5c208409c29a301f');
CREATE TABLE merged (
	id INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	recipe_digest VARCHAR(64) NOT NULL, 
	recipe JSON NOT NULL, 
	base_id INTEGER NOT NULL, 
	files JSON NOT NULL, 
	note VARCHAR NOT NULL, 
	created_at DATETIME NOT NULL, 
	author VARCHAR NOT NULL, 
	CONSTRAINT pk_merged PRIMARY KEY (id), 
	CONSTRAINT ck_merged_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_merged_digest_length CHECK (length(digest) = 64), 
	CONSTRAINT ck_merged_note_length CHECK (length(note) <= 20000), 
	CONSTRAINT ck_merged_recipe_digest_length CHECK (length(recipe_digest) = 64), 
	CONSTRAINT fk_merged_base_id_bases FOREIGN KEY(base_id) REFERENCES bases (id) ON DELETE RESTRICT, 
	CONSTRAINT uq_merged_recipe_digest UNIQUE (recipe_digest)
);
CREATE TABLE merged_blobs (
	merged_id INTEGER NOT NULL, 
	blob_id INTEGER NOT NULL, 
	CONSTRAINT pk_merged_blobs PRIMARY KEY (merged_id, blob_id), 
	CONSTRAINT fk_merged_blobs_blob_id_blobs FOREIGN KEY(blob_id) REFERENCES blobs (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_merged_blobs_merged_id_merged FOREIGN KEY(merged_id) REFERENCES merged (id) ON DELETE CASCADE
);
CREATE TABLE merged_inputs (
	merged_id INTEGER NOT NULL, 
	position INTEGER NOT NULL, 
	checkpoint_id INTEGER NOT NULL, 
	weight DOUBLE NOT NULL, 
	CONSTRAINT pk_merged_inputs PRIMARY KEY (merged_id, position), 
	CONSTRAINT ck_merged_inputs_position_not_negative CHECK (position >= 0), 
	CONSTRAINT fk_merged_inputs_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_merged_inputs_merged_id_merged FOREIGN KEY(merged_id) REFERENCES merged (id) ON DELETE CASCADE
);
CREATE TABLE merged_locations (
	id INTEGER NOT NULL, 
	merged_id INTEGER NOT NULL, 
	url VARCHAR NOT NULL, 
	CONSTRAINT pk_merged_locations PRIMARY KEY (id), 
	CONSTRAINT ck_merged_locations_url_length CHECK (length(url) <= 4096), 
	CONSTRAINT fk_merged_locations_merged_id_merged FOREIGN KEY(merged_id) REFERENCES merged (id) ON DELETE CASCADE, 
	CONSTRAINT uq_merged_locations_merged_id_url UNIQUE (merged_id, url)
);
CREATE TABLE metrics (
	id INTEGER NOT NULL, 
	checkpoint_id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	value DOUBLE, 
	step BIGINT, 
	split VARCHAR NOT NULL, 
	direction VARCHAR, 
	recorded_at DATETIME NOT NULL, 
	author VARCHAR NOT NULL, 
	CONSTRAINT pk_metrics PRIMARY KEY (id), 
	CONSTRAINT ck_metrics_direction_known CHECK (direction IN ('lower', 'higher')), 
	CONSTRAINT ck_metrics_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_metrics_name_length CHECK (length(name) <= 400), 
	CONSTRAINT ck_metrics_split_length CHECK (length(split) <= 400), 
	CONSTRAINT ck_metrics_step_not_negative CHECK (step >= 0), 
	CONSTRAINT fk_metrics_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE CASCADE
);
INSERT INTO "metrics" VALUES(1,1,'eval_loss',0.9,NULL,'eval',NULL,'2025-03-01 12:00:00.000000','ada');
INSERT INTO "metrics" VALUES(2,1,'eval_loss',0.5,NULL,'eval',NULL,'2025-03-01 12:00:00.000000','ada');
INSERT INTO "metrics" VALUES(3,2,'eval_loss',NULL,NULL,'eval',NULL,'2025-03-01 12:00:00.000000','ada');
INSERT INTO "metrics" VALUES(4,3,'eval_loss',0.25,NULL,'',NULL,'2025-03-01 12:00:00.000000','ada');
INSERT INTO "metrics" VALUES(5,1,'magic',1.0,NULL,'','higher','2025-03-01 12:00:00.000000','ada');
INSERT INTO "metrics" VALUES(6,2,'magic',2.0,NULL,'','higher','2025-03-01 12:00:00.000000','ada');
INSERT INTO "metrics" VALUES(7,3,'magic',3.0,NULL,'',NULL,'2025-03-01 12:00:00.000000','ada');
CREATE TABLE notes (
	id INTEGER NOT NULL, 
	checkpoint_id INTEGER NOT NULL, 
	text VARCHAR NOT NULL, 
	author VARCHAR NOT NULL, 
	created_at DATETIME NOT NULL, 
	CONSTRAINT pk_notes PRIMARY KEY (id), 
	CONSTRAINT ck_notes_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_notes_text_length CHECK (length(text) <= 20000), 
	CONSTRAINT fk_notes_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE CASCADE
);
INSERT INTO "notes" VALUES(1,1,'grüße','bob','2025-03-01 12:00:00.000000');
CREATE TABLE shipments (
	id INTEGER NOT NULL, 
	environment VARCHAR NOT NULL, 
	checkpoint_id INTEGER NOT NULL, 
	merged_id INTEGER, 
	note VARCHAR NOT NULL, 
	author VARCHAR NOT NULL, 
	shipped_at DATETIME NOT NULL, 
	restores INTEGER, 
	CONSTRAINT pk_shipments PRIMARY KEY (id), 
	CONSTRAINT ck_shipments_author_length CHECK (length(author) <= 400), 
	CONSTRAINT ck_shipments_environment_length CHECK (length(environment) <= 96), 
	CONSTRAINT ck_shipments_note_length CHECK (length(note) <= 20000), 
	CONSTRAINT fk_shipments_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_shipments_merged_id_merged FOREIGN KEY(merged_id) REFERENCES merged (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_shipments_restores_shipments FOREIGN KEY(restores) REFERENCES shipments (id) ON DELETE RESTRICT
);
INSERT INTO "shipments" VALUES(1,'production',1,NULL,'','ada','2025-03-01 12:00:00.000000',NULL);
INSERT INTO "shipments" VALUES(2,'production',3,NULL,'','ada','2025-03-01 13:00:00.000000',NULL);
INSERT INTO "shipments" VALUES(3,'production',2,NULL,'','ada','2025-03-01 14:00:00.000000',NULL);
CREATE TABLE tags (
	id INTEGER NOT NULL, 
	checkpoint_id INTEGER NOT NULL, 
	"key" VARCHAR NOT NULL, 
	value VARCHAR NOT NULL, 
	CONSTRAINT pk_tags PRIMARY KEY (id), 
	CONSTRAINT ck_tags_key_length CHECK (length(key) <= 96), 
	CONSTRAINT ck_tags_value_length CHECK (length(value) <= 20000), 
	CONSTRAINT fk_tags_checkpoint_id_checkpoints FOREIGN KEY(checkpoint_id) REFERENCES checkpoints (id) ON DELETE CASCADE, 
	CONSTRAINT uq_tags_checkpoint_id_key UNIQUE (checkpoint_id, "key")
);
INSERT INTO "tags" VALUES(1,1,'team','nlu');
INSERT INTO "tags" VALUES(2,2,'score','1e1');
INSERT INTO "tags" VALUES(3,3,'long','xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx');
CREATE INDEX ix_base_blobs_blob_id ON base_blobs (blob_id);
CREATE INDEX ix_checkpoints_adapter_id_step ON checkpoints (adapter_id, step);
CREATE INDEX ix_checkpoints_base_id ON checkpoints (base_id);
CREATE INDEX ix_checkpoints_digest ON checkpoints (digest);
CREATE INDEX ix_merged_base_id ON merged (base_id);
CREATE INDEX ix_merged_digest ON merged (digest);
CREATE INDEX ix_aliases_checkpoint_id ON aliases (checkpoint_id);
CREATE INDEX ix_checkpoint_blobs_blob_id ON checkpoint_blobs (blob_id);
CREATE INDEX ix_merged_blobs_blob_id ON merged_blobs (blob_id);
CREATE INDEX ix_merged_inputs_checkpoint_id ON merged_inputs (checkpoint_id);
CREATE INDEX ix_metrics_checkpoint_id ON metrics (checkpoint_id);
CREATE INDEX ix_notes_checkpoint_id ON notes (checkpoint_id);
CREATE INDEX ix_shipments_checkpoint_id ON shipments (checkpoint_id);
CREATE INDEX ix_shipments_environment ON shipments (environment);
CREATE INDEX ix_shipments_merged_id ON shipments (merged_id);
COMMIT;
