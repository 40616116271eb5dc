{{/* What the schema can't say: combinations that Kubernetes, KServe or Knative would refuse late, or worse, accept. */}}

{{- define "florence2.validate" -}}
{{- $name := include "florence2.name" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the InferenceService's name %q has to be lower case letters, digits and '-', beginning with a letter: set fullnameOverride" $name) -}}
{{- end -}}
{{- if gt (len (printf "%s-transformer-%s" $name .Release.Namespace)) 63 -}}
{{- fail (printf "\"%s-transformer-%s\" has more than 63 characters, the most for a part of a host name: shorten fullnameOverride or the namespace" $name .Release.Namespace) -}}
{{- end -}}
{{- include "florence2.validateModel" . -}}
{{- range list "transformer" "predictor" -}}
{{- $part := dict "root" $ "part" . -}}
{{- include "florence2.validateScaling" $part -}}
{{- include "florence2.validateTimes" $part -}}
{{- end -}}
{{- include "florence2.validateBounds" . -}}
{{- include "florence2.validateConcurrency" . -}}
{{- include "florence2.validateIngress" . -}}
{{- end -}}

{{- define "florence2.validateModel" -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "hub") (not $model.hubId) -}}
{{- fail "model.source=hub needs model.hubId, e.g. florence-community/Florence-2-large-ft" -}}
{{- end -}}
{{- if eq $model.source "storage" -}}
{{- if not $model.storageUri -}}
{{- fail "model.source=storage needs model.storageUri, e.g. s3://bucket/florence-2-large-ft" -}}
{{- end -}}
{{- if and (not $model.processorUri) (not (hasPrefix "pvc://" $model.storageUri)) -}}
{{- fail "model.source=storage needs model.processorUri: a folder with the processor's files only, so that transformers don't download the weights" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "florence2.validateScaling" -}}
{{- $values := index .root.Values .part -}}
{{- $scaling := $values.autoscaling -}}
{{- $mode := .root.Values.mode -}}
{{- $knative := include "florence2.knative" .root -}}
{{- $class := include "florence2.scaler" . -}}
{{- $allowed := ternary (list "kpa" "hpa") (list "hpa" "keda" "external" "none") (ne $knative "") -}}
{{- if not (has $class $allowed) -}}
{{- fail (printf "%s.autoscaling.class=%s doesn't exist in %s mode: use %s" .part $class $mode (join ", " $allowed)) -}}
{{- end -}}
{{- if and (eq .part "predictor") (eq $class "hpa") -}}
{{- fail "predictor.autoscaling.class=hpa scales on CPU, which says nothing about a predictor's load: use kpa (Knative) or keda (Standard)" -}}
{{- end -}}
{{- if and $scaling.maxReplicas (lt (int $scaling.maxReplicas) (int $scaling.minReplicas)) (not (has $class (list "none" "external"))) -}}
{{- fail (printf "%s.autoscaling.maxReplicas=%d is below minReplicas=%d" .part (int $scaling.maxReplicas) (int $scaling.minReplicas)) -}}
{{- end -}}
{{- if and (not $knative) (not $scaling.maxReplicas) (has $class (list "hpa" "keda")) -}}
{{- fail (printf "%s.autoscaling.maxReplicas=0 means no limit in Knative mode only" .part) -}}
{{- end -}}
{{- if eq $class "keda" -}}
{{- if not $scaling.keda.serverAddress -}}
{{- fail (printf "%s.autoscaling.class=keda needs autoscaling.keda.serverAddress, e.g. http://prometheus.monitoring:9090" .part) -}}
{{- end -}}
{{- if and (eq .part "transformer") (not $scaling.keda.query) -}}
{{- fail "transformer.autoscaling.class=keda needs autoscaling.keda.query" -}}
{{- end -}}
{{- end -}}
{{- if eq (int $scaling.minReplicas) 0 -}}
{{- if and (ne $class "kpa") (not (and (eq $class "keda") $scaling.keda.query)) -}}
{{- fail (printf "%s.autoscaling.minReplicas=0: only kpa (Knative) wakes a component from zero, or keda with a query that needs none of its pods" .part) -}}
{{- end -}}
{{- if and (eq .part "predictor") .root.Values.transformer.settings.enable_predictor_health_check -}}
{{- fail "transformer.settings.enable_predictor_health_check=true would keep the predictor from scaling to zero: set it to false, or predictor.autoscaling.minReplicas to 1" -}}
{{- end -}}
{{- end -}}
{{- if and (not (kindIs "invalid" $values.pdb.minAvailable)) (not (kindIs "invalid" $values.pdb.maxUnavailable)) -}}
{{- fail (printf "%s.pdb: set minAvailable or maxUnavailable, the other one to null" .part) -}}
{{- end -}}
{{- end -}}

{{- define "florence2.validateTimes" -}}
{{- $values := index .root.Values .part -}}
{{- $drain := include "florence2.drainSeconds" . | int -}}
{{- if include "florence2.knative" .root -}}
{{- if gt $drain (int $values.timeoutSeconds) -}}
{{- fail (printf "%s: drain_seconds + grace_period = %d outlast timeoutSeconds=%d, after which Knative kills the pod" .part $drain (int $values.timeoutSeconds)) -}}
{{- end -}}
{{- else -}}
{{- $needed := add .root.Values.standard.preStopSeconds $drain | int -}}
{{- $grace := include "florence2.terminationGracePeriodSeconds" . | int -}}
{{- if lt $grace $needed -}}
{{- fail (printf "standard.terminationGracePeriodSeconds=%d is below preStopSeconds + the %s's drain_seconds + grace_period = %d: requests would be cut off" $grace .part $needed) -}}
{{- end -}}
{{- end -}}
{{- $request := $values.settings.request_timeout_seconds -}}
{{- if and $request (gt (float64 $request) (float64 $values.timeoutSeconds)) -}}
{{- fail (printf "%s.settings.request_timeout_seconds=%s outlasts %s.timeoutSeconds=%d, at which the way in is cut" .part (include "florence2.scalar" $request) .part (int $values.timeoutSeconds)) -}}
{{- end -}}
{{- end -}}

{{/* What one component lets in and the other would refuse. */}}
{{- define "florence2.validateBounds" -}}
{{- $predictor := .Values.predictor.settings -}}
{{- if gt (int $predictor.max_rows) (int $predictor.max_queue_size) -}}
{{- fail (printf "predictor.settings.max_rows=%d is above max_queue_size=%d: a full request would never fit" (int $predictor.max_rows) (int $predictor.max_queue_size)) -}}
{{- end -}}
{{- $transformer := include "florence2.settings" (dict "root" . "part" "transformer") | fromYaml -}}
{{- range splitList " " (include "florence2.sharedBounds" .) -}}
{{- $let := index $transformer . -}}
{{- $bound := index $predictor . -}}
{{- if and $let $bound (gt (int $let) (int $bound)) -}}
{{- fail (printf "transformer.settings.%s=%d is above the predictor's %d, which would refuse what the transformer lets in" . (int $let) (int $bound)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Knative alone enforces containerConcurrency; it counts calls, the queue counts rows, of which a call has one or more. */}}
{{- define "florence2.validateConcurrency" -}}
{{- if include "florence2.knative" . -}}
{{- range $part := list "transformer" "predictor" -}}
{{- $values := index $.Values $part -}}
{{- $limit := int $values.containerConcurrency -}}
{{- $kpa := $values.autoscaling.kpa -}}
{{- if and $limit (eq $kpa.metric "concurrency") (gt (int $kpa.target) $limit) (eq (include "florence2.scaler" (dict "root" $ "part" $part)) "kpa") -}}
{{- fail (printf "%s.autoscaling.kpa.target=%d is above containerConcurrency=%d and never reached" $part (int $kpa.target) $limit) -}}
{{- end -}}
{{- end -}}
{{- $limit := int .Values.predictor.containerConcurrency -}}
{{- $batch := int .Values.predictor.settings.max_batch_size -}}
{{- $queue := int .Values.predictor.settings.max_queue_size -}}
{{- if and $limit (lt $limit $batch) -}}
{{- fail (printf "predictor.containerConcurrency=%d is below settings.max_batch_size=%d: batches would never fill; raise it, or lower max_batch_size" $limit $batch) -}}
{{- end -}}
{{- if and $limit (gt $limit (add $batch $queue | int)) -}}
{{- fail (printf "predictor.containerConcurrency=%d is above settings.max_batch_size + max_queue_size = %d: calls would be refused (429) rather than wait for a replica" $limit (add $batch $queue | int)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "florence2.validateIngress" -}}
{{- if .Values.ingress.enabled -}}
{{- if not .Values.ingress.host -}}
{{- fail "ingress.enabled needs ingress.host" -}}
{{- end -}}
{{- if and (eq .Values.ingress.type "gateway") (not .Values.ingress.gateway.name) (not (include "florence2.knative" .)) -}}
{{- fail "ingress.type=gateway needs ingress.gateway.name" -}}
{{- end -}}
{{- end -}}
{{- end -}}
